"""Where a training step's time goes on the device: PyTorch's profiler, kernels grouped by name."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType

NORM, CONVOLUTION = "batch norm, ReLU and addition", "convolution and matrix product"
OPTIMIZER, POOLING, COPIES, OTHERS = "optimizer", "pooling", "copies and casts", "others"
PATTERNS = (  # the first that fits: some convolutions have a "relu" in their names too
    (OPTIMIZER, r"multi_tensor"),
    (NORM, r"batch_?norm|bnorm|cudnn::bn|triton_.*(relu|threshold|fused_add)"),
    (CONVOLUTION, r"conv(?!ert)|xmma|cutlass|gemm|gemv|wgrad|dgrad|fprop|cudnn|nvjet|splitk"),
    (NORM, r"relu|clamp|threshold|functor\w*_add|add_kernel|addfunctor"),
    (POOLING, r"pool"),
    (COPIES, r"copy|memcpy|memset|fill|cat_?array|transpose"),
)
MOST_NAMES = 12


def kind_of(kernel: str, ours: frozenset[str] = frozenset()) -> str:
    """What a kernel does, by its name; `ours` are the names of this library's."""
    if kernel in ours:
        return NORM
    found = (kind for kind, pattern in PATTERNS if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, OTHERS)


def our_kernels() -> frozenset[str]:
    """The names of the Triton kernels in this library's modules."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("batchnorm.kernels"):
            for value in vars(module).values():
                while type(value).__module__.startswith("triton.") and hasattr(value, "fn"):
                    value = value.fn  # tuned, compiled or interpreted, a function lies below
                    found.add(getattr(value, "__name__", ""))
    return frozenset(found - {""})


def kernels(training: Any, batches: list[Any], device: torch.device) -> dict[str, dict]:
    """Seconds of a step's kernels, by kind, and of the longest, by name."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        training.steps(batches)
        if on_gpu:
            torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        if on_gpu:
            # named spans, as the optimizer's, hold kernels that count themselves
            if event.device_type == DeviceType.CUDA and not is_span(event):
                found[event.key] += event.self_device_time_total / 1e6 / len(batches)
        else:
            found[event.key] += event.self_cpu_time_total / 1e6 / len(batches)
    ours, kinds = our_kernels(), Counter()
    for name, seconds in found.items():
        kinds[kind_of(name, ours)] += seconds
    return {"kinds": dict(kinds), "names": dict(found.most_common(MOST_NAMES))}


def is_span(event: Any) -> bool:
    """Whether it is a name that was given to a stretch of time, and no kernel."""
    named = ("ProfilerStep", "Optimizer.", "Torch-Compiled Region", "## Call CompiledFxGraph")
    return bool(getattr(event, "is_user_annotation", False)) or event.key.startswith(named)

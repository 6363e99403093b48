"""What runs the layers on this machine, and why: what `batchnorm doctor` prints."""

from __future__ import annotations

import platform
from typing import NamedTuple

import torch

from batchnorm.kernels.cpu import pool, reason_without
from batchnorm.kernels.cpu.library import cache_folder
from batchnorm.kernels.gpu import library as gpu_library
from batchnorm.kernels.switch import INTERPRETER, switched_to

__all__ = ["Fact", "diagnose"]


class Fact(NamedTuple):
    """One thing about this machine, and how it is."""

    about: str
    finding: str


def diagnose() -> list[Fact]:
    """Versions, the backend of each kind of device, threads, and where kernels are kept."""
    facts = [
        Fact("Python", platform.python_version()),
        Fact("PyTorch", torch.__version__),
        *_cpu(),
    ]
    for index in range(torch.cuda.device_count()):
        facts += _gpu(torch.device("cuda", index))
    return facts


def _gpu(device: torch.device) -> list[Fact]:
    name = f"GPU {device.index}"
    facts = [Fact(name, torch.cuda.get_device_name(device))]
    reason = gpu_library.reason_without_on(device)
    return [*facts, *_triton("", "compiled kernels", reason)]


def _triton(about: str, how: str, reason: str | None) -> list[Fact]:
    """What Triton's kernels do, unless there is a reason for them to do nothing."""
    if reason is not None:
        return [Fact(about, f"reference (PyTorch's operations): {reason}")]
    return [
        Fact(about, f"{how}: float32, bfloat16 and float16"),
        Fact("", "reference: float64, and calls with a mask"),
        Fact("Triton", gpu_library.version()),
    ]


def _cpu() -> list[Fact]:
    if switched_to() == INTERPRETER:
        return _triton("CPU", "the GPU's kernels, interpreted, slow", gpu_library.reason_without())
    reason = reason_without()
    if reason is not None:
        return [Fact("CPU", f"reference (PyTorch's operations): {reason}")]
    import numba

    team = pool.parallel_region() is not None
    threads = torch.get_num_threads() if team else 1
    whose = "PyTorch's own" if team else "PyTorch here has no OpenMP that the kernels can share"
    folder = cache_folder() or "nowhere: each process compiles its own"
    return [
        Fact("CPU", "compiled kernels: float32, float64 and bfloat16"),
        Fact("", "reference: float16, and calls with a mask"),
        Fact("Numba", numba.__version__),
        Fact("threads", f"{threads}: {whose}"),
        Fact("kernels kept in", str(folder)),
    ]

"""A GPU's backend for tests that think in the CPU's tensors: on the GPU, or else interpreted.

Where there is a GPU, every tensor goes there in its own strides, and every result comes back.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from batchnorm.kernels import gpu

HAS_GPU = torch.cuda.is_available()
HAS_KERNELS = gpu.reason_without() is None


def moved(value, device):
    """A tensor on another device, in the same strides; of a tuple or Moments each of theirs."""
    if isinstance(value, Tensor):
        there = value.untyped_storage().to(device=device)
        empty = torch.empty(0, dtype=value.dtype, device=device)
        return empty.set_(there, value.storage_offset(), value.shape, value.stride())
    if hasattr(value, "m2"):
        return type(value)(*(moved(v, device) for v in (value.count, value.mean, value.m2)))
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _there_and_back(function):
    def call(*arguments, **others):
        arguments = [moved(argument, "cuda") for argument in arguments]
        others = {name: moved(other, "cuda") for name, other in others.items()}
        return moved(function(*arguments, **others), "cpu")

    return call


def _tracked(mean, var, batches, batch, momentum):
    there = [None if t is None else moved(t, "cuda") for t in (mean, var, batches)]
    gpu.track(*there, moved(batch, "cuda"), momentum)
    for here, moved_there in zip((mean, var, batches), there, strict=True):
        if here is not None:
            here.copy_(moved_there)


def on_the_cpu():
    """The GPU's backend, for tensors on the CPU."""
    if not HAS_GPU:
        return gpu
    names = ("moments", "apply", "backward_reduce", "backward_apply", "forward", "backward")
    there = {name: _there_and_back(getattr(gpu, name)) for name in names}
    return SimpleNamespace(serves=_there_and_back(gpu.serves), track=_tracked, **there)

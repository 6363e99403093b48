"""What runs the layers on this machine, and why: what `batchnorm doctor` prints."""

from __future__ import annotations

import platform
from typing import NamedTuple

import torch

from batchnorm.kernels.cpu import pool, reason_without
from batchnorm.kernels.cpu.library import cache_folder

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
    if torch.cuda.is_available():
        facts.append(Fact("GPU", "reference: there are no compiled kernels for GPUs yet"))
    return facts


def _cpu() -> list[Fact]:
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

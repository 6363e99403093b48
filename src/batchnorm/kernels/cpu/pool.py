"""Threads: the team that PyTorch's own operations run on.

A second pool beside PyTorch's would put two busy teams on the same cores. So the kernels are
given to the OpenMP library that PyTorch itself loaded, through the entry point that compilers
emit for a parallel region, with as many threads as `torch.set_num_threads` allows.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

__all__ = ["parallel_region", "run"]

_Region = Callable[[int, "ctypes.Array[ctypes.c_char]", int, int], None]

_forked = False


def run(address: int, record: ctypes.Array[ctypes.c_char], tasks: int) -> None:
    """Let a team call the C function at `address` with the record, each thread once.

    No more threads than tasks. One thread, this one, where PyTorch has no team of GNU's kind,
    and in a forked child, whose copy of the team has no threads behind it.
    """
    threads = min(torch.get_num_threads(), tasks)
    region = None if threads == 1 or _forked else parallel_region()
    if region is None:
        _function(address)(record)
    else:
        region(address, record, threads, 0)


@cache
def parallel_region() -> _Region | None:
    """`GOMP_parallel(function, argument, threads, flags)` of PyTorch's OpenMP; None without one."""
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu.*")):
        try:  # a look-up goes on into what the library itself is linked to
            region = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        region.restype = None
        return region
    return None


@cache
def _function(address: int) -> Callable[[ctypes.Array[ctypes.c_char]], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

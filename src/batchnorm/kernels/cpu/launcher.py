"""From tensors to a kernel: the record that it is given, and the call."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.cpu import pool
from batchnorm.kernels.cpu.library import (
    ADDRESSES,
    COUNTERS,
    FRACTIONS,
    PLAN,
    SETTINGS,
    STRIDES,
    Variant,
    address_of,
)
from batchnorm.kernels.cpu.plan import Plan
from batchnorm.kernels.layout import layout_of

__all__ = ["NO_SETTINGS", "STORAGE", "Settings", "launch"]

STORAGE = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"}
"""The dtypes that the kernels know, and what NumPy calls the memory of each."""

ALONE = 2**16  # values: fewer are done before a second thread has begun
WALKED = 6  # so many of the addresses, the first, come with strides


class Settings(NamedTuple):
    """What a kernel is given besides tensors; kernels that do not ask for it do not look."""

    eps: float = 0.0
    act: str = "identity"
    parameter: float = 0.0  # the activation's
    known: bool = False  # whether the moments, or the backward pass's sums, come in
    share: float = 0.0  # of a batch in running statistics


NO_SETTINGS = Settings()

_PLACES = {name: place for place, name in enumerate(ADDRESSES)}
_NOWHERE = [0] * len(ADDRESSES)
_HEAD = struct.Struct(
    f"={len(COUNTERS) + len(PLAN) + len(STRIDES) + len(SETTINGS)}q{len(FRACTIONS)}d"
)
_TAIL = struct.Struct(f"={len(ADDRESSES)}q")
_Record = ctypes.c_char * (_HEAD.size + _TAIL.size)


def launch(
    kernel: str,
    plan: Plan,
    dtype: torch.dtype,
    settings: Settings = NO_SETTINGS,
    **tensors: Tensor | None,
) -> None:
    """Run a kernel over a plan, on tensors by the record's names; None for those it has not."""
    addresses = _NOWHERE.copy()
    strides = []
    for name, tensor in tensors.items():
        if tensor is not None:
            place = _PLACES[name]
            addresses[place] = tensor.data_ptr()
            if place < WALKED:
                strides.append((place, tensor.stride()))
    head, address, tasks = _prepared(kernel, plan, dtype, settings, tuple(strides))
    record = _Record.from_buffer_copy(head + _TAIL.pack(*addresses))
    pool.run(address, record, tasks)


@lru_cache(maxsize=4096)
def _prepared(
    kernel: str,
    plan: Plan,
    dtype: torch.dtype,
    settings: Settings,
    walked: tuple[tuple[int, tuple[int, ...]], ...],
) -> tuple[bytes, int, int]:
    """What is the same for every call like this: the record's head, the kernel, its tasks."""
    strides = [0] * (2 * WALKED)
    repeat = plan.repeat
    for place, stride in walked:
        layout = layout_of(plan.shape, stride)
        assert layout is not None
        strides[2 * place : 2 * place + 2] = layout.outer, layout.inner
        if layout.outer != plan.channels * plan.length:  # gaps between the rows
            repeat = 1
    head = _HEAD.pack(
        *(0 for _ in COUNTERS), *plan.numbers, *strides, repeat, settings.known, settings.eps,
        settings.share, settings.parameter,
    )  # fmt: skip
    residual = "none"
    if any(place == _PLACES["residual"] for place, _ in walked):
        residual = "kept_last" if kernel == "backward" and not settings.known else "kept_first"
    variant = Variant(kernel, plan.family, STORAGE[dtype], settings.act, residual)
    return head, address_of(variant), 1 if plan.size < ALONE else plan.tasks

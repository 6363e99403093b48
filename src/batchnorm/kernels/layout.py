"""How a tensor lies in memory, and how others are brought to lie beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Layout", "Walk", "empty_beside", "fitting", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """Strides, in values, of a tensor (n, c, *positions) that the kernels can walk."""

    channels_last: bool
    outer: int  # from sample to sample; channels last: from position to position
    inner: int  # from channel to channel


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout | None:
    """The layout, where positions follow each other, or channels do; else None."""
    n, c, *positions = shape
    length = math.prod(positions)
    step = expected = None
    for size, distance in zip(reversed(positions), reversed(stride[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = expected = distance
        if distance != expected:
            return None
        expected *= size
    if step == 1:
        return Layout(False, stride[0], stride[1])
    if c > 1 and stride[1] != 1:
        return None
    if c == 1 and step is not None:  # with gaps; an output without them would be walked otherwise
        return None
    if step is None:  # one position
        return Layout(True, stride[0], 1)
    if n > 1 and stride[0] != length * step:
        return None
    return Layout(True, step, 1)


@runtime_checkable
class Walk(Protocol):
    """What a backend's plan says of the layouts that its loops can walk together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensors, (n, c, *positions)."""

    @property
    def channels_last(self) -> bool:
        """Whether channels follow each other in memory."""

    def fits(self, layout: Layout) -> bool:
        """Whether the loops can walk a tensor of that layout beside the one planned for."""


def empty_beside(x: Tensor, walk: Walk, dtype: torch.dtype | None = None) -> Tensor:
    """An output for x, in strides that the loops can walk; as a rule those of `empty_like`."""
    y = torch.empty_like(x, dtype=dtype)
    if y.stride() == x.stride():
        return y
    layout = layout_of(walk.shape, y.stride())
    if layout is not None and walk.fits(layout):
        return y
    # x's values overlap or have gaps, and without them fall into an order of their own
    if walk.channels_last:
        n, c, *positions = walk.shape
        return y.new_empty((n, *positions, c)).movedim(-1, 1)
    return y.new_empty(walk.shape)


def fitting(tensor: Tensor, x: Tensor, walk: Walk) -> Tensor:
    """A tensor of x's shape as it is where the loops can walk its strides, else a copy."""
    if not tensor.is_neg():
        stride = tensor.stride()
        if stride == x.stride():
            return tensor
        layout = layout_of(walk.shape, stride)
        if layout is not None and walk.fits(layout):
            return tensor
    return empty_beside(x, walk, tensor.dtype).copy_(tensor)

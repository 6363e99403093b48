"""By how much answers differ, and how much of that rounding explains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["difference", "tolerance"]


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of max |a − b| / max |b| over the pairs; infinite where they do not compare.

    Infinities and NaN differ by nothing from their like, and infinitely from all else.
    """
    if [t.shape for t in ours] != [t.shape for t in expected]:
        return math.inf
    return max((_difference(a, b) for a, b in zip(ours, expected, strict=True)), default=0.0)


def tolerance(
    tensors: Iterable[Tensor], *, least: float = 1e-5, resolutions: float = 10.0
) -> float:
    """The difference that rounding may make: of the coarsest dtype so many resolutions.

    - `least`: what may differ in any dtype.
    """
    floating = {t.dtype for t in tensors if t.is_floating_point()}
    return max(least, *(resolutions * torch.finfo(dtype).eps for dtype in floating), 0.0)


def _difference(ours: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    ours, expected = ours.to("cpu", dtype), expected.to("cpu", dtype)
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    apart = (ours - expected).abs().masked_fill(same, 0)
    finite = expected.abs().masked_fill(~expected.isfinite(), 0)
    off, size = float(apart.max()), float(finite.max())
    if off == 0:
        return 0.0
    return off / size if size and math.isfinite(off) else math.inf

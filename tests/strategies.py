"""Hypothesis strategies: tensors of every rank, layout, scale and offset a layer may meet."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

LAYOUTS = ("contiguous", "channels_last", "permuted", "strided", "expanded_batch")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides."""
    if layout == "channels_last":
        order = (0, *range(2, x.ndim), 1)
        inverse = (0, x.ndim - 1, *range(1, x.ndim - 1))
        return x.permute(order).contiguous().permute(inverse)
    if layout == "permuted":
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded_batch":  # zero strides: one sample seen many times
        return x[:1].expand(x.shape)
    return x.contiguous()


@st.composite
def shapes(draw, min_values=2):
    """(n, c, *positions) with at least `min_values` values a channel."""
    ndim = draw(st.integers(2, 5))
    n = draw(st.integers(1, 6))
    c = draw(st.integers(1, 5))
    positions = draw(st.lists(st.integers(1, 4), min_size=ndim - 2, max_size=ndim - 2))
    values = n
    for p in positions:
        values *= p
    if values < min_values:
        n = n * min_values
    return (n, c, *positions)


@st.composite
def tensors(draw, dtype=torch.float64, max_ratio=1e3):
    """A tensor with its own offset and spread in every channel."""
    shape = draw(shapes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = 10.0 ** draw(st.integers(-3, 3))
    offset = spread * draw(st.floats(-max_ratio, max_ratio))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + offset
    return lay_out(x.to(dtype), draw(st.sampled_from(LAYOUTS[:4])))

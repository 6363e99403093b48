"""From a channel's numbers to those that its values are multiplied with.

Float64, which most GPUs compute slowly, takes part where float32 would lose: in the mean, whose
rounding the shift gives back, and in a variance that is beyond float32's largest.
"""

from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["affine", "coefficients_at", "gradient_coefficients", "standardization"]

# a variance beside which ε is nothing, and of which the root of a part is taken
LARGE = tl.constexpr(2.0**100)
LARGE_PART = tl.constexpr(2.0**-120)
LARGE_ROOT = tl.constexpr(2.0**-60)


@no_type_check
@triton.jit
def standardization(mean, m2, count, eps):
    """The center, what rounding the mean to it added, 1/√(var + ε), and n."""
    center = mean.to(tl.float32)
    added = (center.to(tl.float64) - mean).to(tl.float32)
    n = tl.maximum(count, 1).to(tl.float32)
    var = m2.to(tl.float64) * (1 / n).to(tl.float64)
    is_large = var > LARGE
    var = tl.where(is_large, var * LARGE_PART, var).to(tl.float32)
    inverse = tl.rsqrt(var + tl.where(is_large, 0.0, eps)) * tl.where(is_large, LARGE_ROOT, 1.0)
    return center, added, inverse, n


@no_type_check
@triton.jit
def affine(added, inverse, weight, bias, channel, valid):
    """Scale and shift."""
    scale = inverse
    if weight is not None:
        scale = scale * tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
    shift = added * scale
    if bias is not None:
        shift = shift + tl.load(bias + channel, mask=valid, other=0).to(tl.float32)
    return scale, shift


@no_type_check
@triton.jit
def coefficients_at(
    first, second, third, weight, bias, eps, at, channel, valid, KNOWN: tl.constexpr
):
    """Center, scale and shift: as they come, or from mean, m2 and count."""
    one = tl.load(first + at, mask=valid, other=0)
    two = tl.load(second + at, mask=valid, other=0)
    three = tl.load(third + at, mask=valid, other=0)
    if KNOWN:
        center, scale, shift = one.to(tl.float32), two.to(tl.float32), three.to(tl.float32)
    else:
        center, added, inverse, _ = standardization(one.to(tl.float64), two, three, eps)
        scale, shift = affine(added, inverse, weight, bias, channel, valid)
    return center, scale, shift


@no_type_check
@triton.jit
def gradient_coefficients(total, about_center, added, inverse, n):
    """γ's gradient, and slope and offset of dx = scale·(g + (x − center)·slope + offset).

    From Σg and Σg·(x − center).
    """
    projection = tl.fma(added, total, about_center)
    slope = -(projection / n) * inverse * inverse
    return projection * inverse, slope, tl.fma(added, slope, -(total / n))

"""Both halves of a pass in one program, where it holds all values of its channels."""

from typing import no_type_check

import triton
import triton.language as tl

from batchnorm.kernels.gpu.compiled.activations import activated, differentiated
from batchnorm.kernels.gpu.compiled.coefficients import (
    affine,
    gradient_coefficients,
    standardization,
)
from batchnorm.kernels.gpu.compiled.moments import rest_and_m2, square_factor, widened
from batchnorm.kernels.gpu.compiled.tiles import (
    channels_of,
    lane_count,
    load,
    offset_of,
    share_of_program,
    tile_at,
)

__all__ = ["whole_backward", "whole_forward"]

SIZES = ("rows", "width", "columns", "blocks")


@no_type_check
@triton.jit(do_not_specialize=[
    "x_outer", "x_inner", "y_outer", "y_inner", "residual_outer", "residual_inner", *SIZES
])  # fmt: skip
def whole_forward(
    x, y, residual, counts, mean, m2, weight, bias, eps, parameter,
    x_outer, x_inner, y_outer, y_inner, residual_outer, residual_inner,
    rows, width, columns, blocks,
    ACT: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Moments, and y = act((x − center)·scale + shift + residual); x is read once."""
    block, _, group = share_of_program(blocks, 1)
    row, within, valid = tile_at(0, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST)
    value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
    count = lane_count(0, rows, width, UNIT, LANES, PIECE, LAST)
    about = tl.sum(value, 0, keep_dims=True) / count
    deviation = tl.where(valid, value - about, 0)
    factor = square_factor(deviation)
    deviation *= factor
    rest, squares = rest_and_m2(deviation, deviation * deviation, count)
    middle, squares = widened(about, rest, squares, factor)

    channel, index, there = channels_of(
        block, group, width, columns, columns, UNIT, COLUMNS, LAST, False
    )
    counted = tl.zeros_like(squares).to(tl.int64) + count
    tl.store(counts + index, counted, mask=there)
    tl.store(mean + index, middle, mask=there)
    tl.store(m2 + index, squares, mask=there)

    center, added, inverse, _ = standardization(middle, squares, counted, eps)
    scale, shift = affine(added, inverse, weight, bias, channel, there)
    z = tl.fma(value - center, scale, shift)
    if residual is not None:
        at = offset_of(row, within, block, residual_outer, residual_inner, UNIT)
        z += load(residual, at, valid)
    at = offset_of(row, within, block, y_outer, y_inner, UNIT)
    tl.store(y + at, activated(z, parameter, ACT), mask=valid)


@no_type_check
@triton.jit(do_not_specialize=[
    "dy_outer", "dy_inner", "x_outer", "x_inner", "residual_outer", "residual_inner",
    "g_outer", "g_inner", "dx_outer", "dx_inner", *SIZES
])  # fmt: skip
def whole_backward(
    dy, x, residual, g, dx, counts, mean, m2, weight, bias, eps, parameter, d_weight, d_bias,
    dy_outer, dy_inner, x_outer, x_inner, residual_outer, residual_inner, g_outer, g_inner,
    dx_outer, dx_inner, rows, width, columns, blocks,
    ACT: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx through mean and variance, and γ's and β's gradients; dy and x are read once."""
    block, _, group = share_of_program(blocks, 1)
    row, within, valid = tile_at(0, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST)
    gradient = load(dy, offset_of(row, within, block, dy_outer, dy_inner, UNIT), valid)
    value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)

    channel, index, there = channels_of(
        block, group, width, columns, columns, UNIT, COLUMNS, LAST, False
    )
    center, added, inverse, n = standardization(
        tl.load(mean + index, mask=there, other=0).to(tl.float64),
        tl.load(m2 + index, mask=there, other=0),
        tl.load(counts + index, mask=there, other=0),
        eps,
    )
    scale, shift = affine(added, inverse, weight, bias, channel, there)
    deviation = tl.where(valid, value - center, 0)
    if ACT != "identity":
        z = tl.fma(deviation, scale, shift)
        if residual is not None:
            at = offset_of(row, within, block, residual_outer, residual_inner, UNIT)
            z += load(residual, at, valid)
        gradient = tl.where(valid, differentiated(gradient, z, parameter, ACT), 0)
    if g is not None:
        tl.store(g + offset_of(row, within, block, g_outer, g_inner, UNIT), gradient, mask=valid)

    total = tl.sum(gradient, 0, keep_dims=True)
    about_center = tl.sum(gradient * deviation, 0, keep_dims=True)
    for_weight, steepness, height = gradient_coefficients(total, about_center, added, inverse, n)
    if d_weight is not None:
        tl.store(d_weight + index, for_weight, mask=there)
    if d_bias is not None:
        tl.store(d_bias + index, total, mask=there)
    at = offset_of(row, within, block, dx_outer, dx_inner, UNIT)
    tl.store(dx + at, tl.fma(deviation, steepness, gradient + height) * scale, mask=valid)

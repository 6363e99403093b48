"""What needs one sweep: the normalization itself, and the parts and the end of its gradient."""

from typing import no_type_check

import triton
import triton.language as tl

from batchnorm.kernels.gpu.compiled.activations import activated, differentiated
from batchnorm.kernels.gpu.compiled.coefficients import (
    affine,
    coefficients_at,
    gradient_coefficients,
    standardization,
)
from batchnorm.kernels.gpu.compiled.tiles import (
    channels_of,
    columns_of,
    load,
    offset_of,
    share_of_program,
    tile_at,
)

__all__ = ["apply", "input_gradient", "merge_sums", "partial_sums"]

SIZES = ("rows", "width", "columns", "channels", "tiles", "run", "blocks", "segments")


@no_type_check
@triton.jit(do_not_specialize=[
    "x_outer", "x_inner", "y_outer", "y_inner", "residual_outer", "residual_inner", *SIZES
])  # fmt: skip
def apply(
    x, y, residual, first, second, third, weight, bias, eps, parameter,
    x_outer, x_inner, y_outer, y_inner, residual_outer, residual_inner,
    rows, width, columns, channels, tiles, run, blocks, segments,
    KNOWN: tl.constexpr, ACT: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """y = act((x − center)·scale + shift + residual)."""
    block, segment, group = share_of_program(blocks, segments)
    channel, index, there = channels_of(
        block, group, width, columns, channels, UNIT, COLUMNS, LAST, REPEATS
    )
    center, scale, shift = coefficients_at(
        first, second, third, weight, bias, eps, index, channel, there, KNOWN
    )
    for tile in range(segment * run, tl.minimum(segment * run + run, tiles)):
        row, within, valid = tile_at(
            tile, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST
        )
        value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
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
def partial_sums(
    dy, x, residual, g, dx, parts, first, second, third, weight, bias, eps, parameter,
    dy_outer, dy_inner, x_outer, x_inner, residual_outer, residual_inner, g_outer, g_inner,
    dx_outer, dx_inner, rows, width, columns, channels, tiles, run, blocks, segments,
    KNOWN: tl.constexpr, ACT: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·(x − center) of one segment, to parts (groups, segments, 2, columns).

    g is written where it is asked for, and dx = scale·g, which is all where the moments are
    constants.
    """
    block, segment, group = share_of_program(blocks, segments, BACKWARDS=True)
    channel, index, there = channels_of(
        block, group, width, columns, channels, UNIT, COLUMNS, LAST, REPEATS
    )
    center, scale, shift = coefficients_at(
        first, second, third, weight, bias, eps, index, channel, there, KNOWN
    )
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    projection = tl.zeros((LANES, COLUMNS), tl.float32)
    for tile in range(segment * run, tl.minimum(segment * run + run, tiles)):
        row, within, valid = tile_at(
            tile, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST
        )
        gradient = load(dy, offset_of(row, within, block, dy_outer, dy_inner, UNIT), valid)
        value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
        deviation = tl.where(valid, value - center, 0)
        if ACT != "identity":
            z = tl.fma(deviation, scale, shift)
            if residual is not None:
                at = offset_of(row, within, block, residual_outer, residual_inner, UNIT)
                z += load(residual, at, valid)
            gradient = differentiated(gradient, z, parameter, ACT)
        if g is not None:
            at = offset_of(row, within, block, g_outer, g_inner, UNIT)
            tl.store(g + at, gradient, mask=valid)
        if dx is not None:
            at = offset_of(row, within, block, dx_outer, dx_inner, UNIT)
            tl.store(dx + at, gradient * scale, mask=valid)
        if parts is not None:
            gradient = tl.where(valid, gradient, 0)
            total += gradient
            projection = tl.fma(gradient, deviation, projection)
    if parts is not None:
        column = columns_of(block, COLUMNS)
        to = parts + ((group * segments + segment) * 2).to(tl.int64) * columns + column
        tl.store(to, tl.sum(total, 0, keep_dims=True), mask=there)
        tl.store(to + columns, tl.sum(projection, 0, keep_dims=True), mask=there)


@no_type_check
@triton.jit(do_not_specialize=["entries", "repeat", "channels", "blocks"])
def merge_sums(
    parts, total, about_center, mean, m2, counts, weight, bias, eps, d_weight, d_bias,
    slope, offset, center, scale, shift, entries, repeat, channels, blocks,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of each channel of each group, in one order, and what follows from them.

    With slope and offset come the coefficients, so that the next sweep has not to compute them.
    """
    block, _, group = share_of_program(blocks, 1)
    channel = columns_of(block, COLUMNS)
    there = channel < channels
    columns = repeat * channels
    base = parts + (group * (entries // repeat)).to(tl.int64) * 2 * columns + channel
    totals = tl.zeros((LANES, COLUMNS), tl.float64)
    projections = tl.zeros((LANES, COLUMNS), tl.float64)
    for start in range(0, entries, LANES):
        entry = start + tl.arange(0, LANES)[:, None]
        valid = (entry < entries) & there
        at = base + (entry // repeat).to(tl.int64) * 2 * columns + (entry % repeat) * channels
        totals += tl.load(at, mask=valid, other=0).to(tl.float64)
        projections += tl.load(at + columns, mask=valid, other=0).to(tl.float64)
    sums = tl.sum(totals, 0, keep_dims=True)
    about = tl.sum(projections, 0, keep_dims=True)
    at = group * channels + channel
    if total is not None:
        tl.store(total + at, sums, mask=there)
        tl.store(about_center + at, about, mask=there)
    if mean is not None:
        middle, added, inverse, n = standardization(
            tl.load(mean + at, mask=there, other=0).to(tl.float64),
            tl.load(m2 + at, mask=there, other=0),
            tl.load(counts + at, mask=there, other=0),
            eps,
        )
        sums = sums.to(tl.float32)
        for_weight, steepness, height = gradient_coefficients(
            sums, about.to(tl.float32), added, inverse, n
        )
        if d_weight is not None:
            tl.store(d_weight + at, for_weight, mask=there)
        if d_bias is not None:
            tl.store(d_bias + at, sums, mask=there)
        if slope is not None:
            tl.store(slope + at, steepness, mask=there)
            tl.store(offset + at, height, mask=there)
            multiplier, summand = affine(added, inverse, weight, bias, channel, there)
            tl.store(center + at, middle, mask=there)
            tl.store(scale + at, multiplier, mask=there)
            tl.store(shift + at, summand, mask=there)


@no_type_check
@triton.jit(do_not_specialize=[
    "dy_outer", "dy_inner", "x_outer", "x_inner", "dx_outer", "dx_inner", *SIZES
])  # fmt: skip
def input_gradient(
    dy, x, dx, center, scale, shift, slope, offset, parameter,
    dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    rows, width, columns, channels, tiles, run, blocks, segments,
    ACT: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """dx = scale·(g + (x − center)·slope + offset)."""
    block, segment, group = share_of_program(blocks, segments)
    _, index, there = channels_of(
        block, group, width, columns, channels, UNIT, COLUMNS, LAST, REPEATS
    )
    middle = load(center, index, there)
    multiplier, summand = load(scale, index, there), load(shift, index, there)
    steepness, height = load(slope, index, there), load(offset, index, there)
    for tile in range(segment * run, tl.minimum(segment * run + run, tiles)):
        row, within, valid = tile_at(
            tile, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST
        )
        g = load(dy, offset_of(row, within, block, dy_outer, dy_inner, UNIT), valid)
        value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
        deviation = value - middle
        g = differentiated(g, tl.fma(deviation, multiplier, summand), parameter, ACT)
        at = offset_of(row, within, block, dx_outer, dx_inner, UNIT)
        tl.store(dx + at, tl.fma(deviation, steepness, g + height) * multiplier, mask=valid)

"""Count, mean and m2 of channels that are split over programs: parts, and their merging."""

from typing import no_type_check

import triton
import triton.language as tl

from batchnorm.kernels.gpu.compiled.coefficients import affine, standardization
from batchnorm.kernels.gpu.compiled.tiles import (
    columns_of,
    lane_count,
    load,
    offset_of,
    share_of_program,
    tile_at,
)

__all__ = ["merge_moments", "partial_moments", "rest_and_m2", "square_factor", "widened"]

LARGE = tl.constexpr(2.0**40)  # deviations whose squares might overflow, in many
LESS, MORE = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)


@no_type_check
@triton.jit
def square_factor(deviation):
    """What a channel's deviations are multiplied with before they are squared; as a rule 1."""
    largest = tl.max(tl.abs(deviation), 0, keep_dims=True)
    return tl.where(largest > LARGE, LESS, 1.0)


@no_type_check
@triton.jit
def rest_and_m2(sums, squares, count):
    """The mean of deviations, which is what they are off, and m2, from their sums over lanes."""
    rest = tl.sum(sums, 0, keep_dims=True) / count
    m2 = tl.sum(squares, 0, keep_dims=True) - rest * rest * count
    return rest, tl.where(m2 < 0, 0, m2)


@no_type_check
@triton.jit
def widened(about, rest, m2, factor):
    """Mean and m2 in float64, without the factor."""
    wide = tl.where(factor < 1, MORE, 1.0).to(tl.float64)
    return about.to(tl.float64) + rest.to(tl.float64) * wide, m2.to(tl.float64) * wide * wide


@no_type_check
@triton.jit(do_not_specialize=[
    "x_outer", "x_inner", "rows", "width", "columns", "tiles", "run", "blocks", "segments"
])  # fmt: skip
def partial_moments(
    x, parts, x_outer, x_inner, rows, width, columns, tiles, run, blocks, segments,
    UNIT: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Those of one segment of a block's columns, to parts (groups, segments, 5, columns).

    In float32: count, a number near the mean, what the mean is more, m2, and the factor of both.

    Deviations are taken from the first tile's mean, lane by lane, so that no lane has to ask
    another before the end. What cancellation takes is bounded: m2's relative error grows at most by
    as many times as the segment has tiles, for however far off that mean is, the first tile's own
    share of m2 is as large.
    """
    block, segment, group = share_of_program(blocks, segments, BACKWARDS=True)
    first = segment * run
    row, within, valid = tile_at(
        first, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST
    )
    value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
    count = lane_count(first, rows, width, UNIT, LANES, PIECE, LAST)
    about = tl.sum(value, 0, keep_dims=True) / count
    deviation = tl.where(valid, value - about, 0)
    factor = square_factor(deviation)
    deviation *= factor
    sums, squares = deviation, deviation * deviation
    for tile in range(first + 1, tl.minimum(first + run, tiles)):
        row, within, valid = tile_at(
            tile, block, group, rows, width, UNIT, LANES, COLUMNS, PIECE, LAST
        )
        value = load(x, offset_of(row, within, block, x_outer, x_inner, UNIT), valid)
        deviation = tl.where(valid, value - about, 0) * factor
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
        count += lane_count(tile, rows, width, UNIT, LANES, PIECE, LAST)
    rest, m2 = rest_and_m2(sums, squares, count)
    column = columns_of(block, COLUMNS)
    there = column < columns
    to = parts + ((group * segments + segment) * 5).to(tl.int64) * columns + column
    tl.store(to, tl.zeros_like(m2) + count, mask=there)
    tl.store(to + columns, about, mask=there)
    tl.store(to + 2 * columns, rest, mask=there)
    tl.store(to + 3 * columns, m2, mask=there)
    tl.store(to + 4 * columns, factor, mask=there)


@no_type_check
@triton.jit(do_not_specialize=["entries", "repeat", "channels", "blocks"])
def merge_moments(
    parts, counts, mean, m2, weight, bias, eps, center, scale, shift,
    entries, repeat, channels, blocks, LANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of each channel of each group, in one order (Chan et al. 1979).

    Where rows were taken `repeat` at a time, a channel has so many columns in each part. Where they
    are asked for, the coefficients come too, so that the next sweep has not to compute them.
    """
    block, _, group = share_of_program(blocks, 1)
    channel = columns_of(block, COLUMNS)
    there = channel < channels
    columns = repeat * channels
    base = parts + (group * (entries // repeat)).to(tl.int64) * 5 * columns + channel
    about = tl.load(base + columns, mask=there, other=0).to(tl.float64)
    count = tl.zeros((LANES, COLUMNS), tl.float64)
    sums = tl.zeros((LANES, COLUMNS), tl.float64)
    squares = tl.zeros((LANES, COLUMNS), tl.float64)
    for start in range(0, entries, LANES):
        entry = start + tl.arange(0, LANES)[:, None]
        valid = (entry < entries) & there
        at = base + (entry // repeat).to(tl.int64) * 5 * columns + (entry % repeat) * channels
        n = tl.load(at, mask=valid, other=0).to(tl.float64)
        middle, inner = widened(
            tl.load(at + columns, mask=valid, other=0),
            tl.load(at + 2 * columns, mask=valid, other=0),
            tl.load(at + 3 * columns, mask=valid, other=0),
            tl.load(at + 4 * columns, mask=valid, other=1),
        )
        deviation = tl.where(valid, middle - about, 0)
        count += n
        sums += n * deviation
        squares += inner + n * deviation * deviation
    n = tl.sum(count, 0, keep_dims=True)
    rest = tl.sum(sums, 0, keep_dims=True) / n
    total = tl.sum(squares, 0, keep_dims=True) - rest * rest * n
    middle = about + rest
    total = tl.where(total < 0, 0, total)
    at = group * channels + channel
    tl.store(counts + at, n.to(tl.int64), mask=there)
    tl.store(mean + at, middle, mask=there)
    tl.store(m2 + at, total, mask=there)
    if center is not None:
        middle, added, inverse, _ = standardization(middle, total, n.to(tl.int64), eps)
        multiplier, summand = affine(added, inverse, weight, bias, channel, there)
        tl.store(center + at, middle, mask=there)
        tl.store(scale + at, multiplier, mask=there)
        tl.store(shift + at, summand, mask=there)

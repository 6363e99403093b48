"""How a program walks a tensor: tile by tile, in one shape for every layout.

A tile is an array (lanes, columns). Where channels are last, its columns are channels and its lanes
rows of them. Otherwise it has one column, its lanes lie in rows of PIECE positions, and it belongs
to one channel: the program's block. So sums over a channel run over lanes alike in both.
"""

from typing import no_type_check

import triton
import triton.language as tl

__all__ = [
    "channels_of",
    "columns_of",
    "lane_count",
    "load",
    "offset_of",
    "share_of_program",
    "tile_at",
]


@no_type_check
@triton.jit
def share_of_program(blocks, segments, BACKWARDS: tl.constexpr = False):
    """Which block of channels, which of its segments, and which group this program has.

    Neighbours have neighbouring channels of the same rows. Of two sweeps the first goes backwards
    over the tensor, so that the second begins with what the cache holds.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    rest = program // blocks
    return program % blocks, rest % segments, rest // segments


@no_type_check
@triton.jit
def columns_of(block, COLUMNS: tl.constexpr):
    """The columns of a block, (1, COLUMNS)."""
    return block * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@no_type_check
@triton.jit
def channels_of(
    block, group, width, columns, channels,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """The channel of each column, its place in statistics (groups, channels), and if there is one.

    REPEATS: whether rows are taken as one, so that a channel has several columns.
    """
    column = columns_of(block, COLUMNS)
    if LAST:
        columns = width * UNIT  # the same, and known to be aligned
    channel = column
    if REPEATS:
        channel = column % channels
    else:
        channels = columns
    return channel, group * channels + channel, column < columns


@no_type_check
@triton.jit
def tile_at(
    tile, block, group, rows, width, UNIT: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Rows, places within the rows, and which of these there are, of a group's tile.

    Widths and strides come in units of UNIT values. The unit stands in the code, so that the
    compiler knows what is aligned, and moves as much at once.
    """
    lane = tl.arange(0, LANES)[:, None]
    if LAST:
        row = tile * LANES + lane
        within = columns_of(block, COLUMNS)
    else:
        pieces = tl.cdiv(width * UNIT, PIECE)
        row = (tile // pieces) * (LANES // PIECE) + lane // PIECE
        within = (tile % pieces) * PIECE + lane % PIECE
    valid = (row < rows) & (within < width * UNIT)
    return group.to(tl.int64) * rows + row, within, valid


@no_type_check
@triton.jit
def lane_count(
    tile, rows, width, UNIT: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """How many lanes of a tile there are: values of each of its channels."""
    if LAST:
        count = tl.minimum(rows - tile * LANES, LANES)
    else:
        pieces = tl.cdiv(width * UNIT, PIECE)
        high = tl.minimum(rows - (tile // pieces) * (LANES // PIECE), LANES // PIECE)
        count = high * tl.minimum(width * UNIT - (tile % pieces) * PIECE, PIECE)
    return count


@no_type_check
@triton.jit
def offset_of(row, within, block, outer, inner, UNIT: tl.constexpr):
    """Where a tile's values lie."""
    return row * outer * UNIT + block.to(tl.int64) * inner * UNIT + within


@no_type_check
@triton.jit
def load(pointer, offset, valid):
    """Values, or a channel's numbers, in float32; 0 where there are none."""
    return tl.load(pointer + offset, mask=valid, other=0).to(tl.float32)

"""How programs share a tensor: tiles, and what makes a program's share of them.

Everything here follows from shapes and strides, never from the GPU. (Within a tile it is Triton
that decides how threads share a sum: by the GPU's kind, dtypes, and how tensors are aligned.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from batchnorm.kernels.layout import Layout, layout_of

__all__ = ["Plan", "Tile", "plan_of", "whole_plan_of"]

TILE = 2048  # values that a program holds at a time, in one tensor
PROGRAMS = 1024  # of a sum: about what a large GPU runs at once
SWEEPS = 2048  # of a sweep without sums, which pays nothing for each of its programs
LONGEST_SWEEP = 8  # tiles
LONGEST_SUM = 64  # tiles: bounds what cancellation takes; see partial_moments
LINE = 128  # bytes side by side that fill a memory transaction
SECTOR = 32  # bytes: fewer are not read from memory, but may be from the cache
VECTOR = 16  # bytes: a thread loads so many at once
WHOLE = {1: 2**14, 2: 2**13}  # values that registers hold at once, of one tensor and of two
PIECES = (1024, 512, 256, 128, 64)  # positions of a tile's row, the longest first
LOST = 0.1  # of a tile, at most, for longer rows


@dataclass(frozen=True)
class Tile:
    """The shape of what a program holds at a time; see compiled/tiles.py."""

    lanes: int
    columns: int
    piece: int  # positions side by side; 1 where channels are last

    @property
    def size(self) -> int:
        """Values."""
        return self.lanes * self.columns

    @property
    def warps(self) -> int:
        """So many that a thread has 16 values, or in the largest tiles 32."""
        return min(max(self.size // 512, 1), 16)


@dataclass(frozen=True, eq=False)  # one object a plan, so that looking it up is cheap
class Plan:
    """How programs go over `groups` slices of a tensor."""

    shape: tuple[int, ...]  # of the tensor
    channels_last: bool
    groups: int
    channels: int
    rows: int  # of a group: samples, or where channels are last positions
    length: int  # positions of a row; 1 where channels are last
    repeat: int  # rows taken as one: narrow ones without gaps, where channels are last
    itemsize: int
    tile: Tile

    def fits(self, layout: Layout) -> bool:
        """Whether the programs can walk a tensor of that layout beside the one planned for."""
        if self.channels_last != layout.channels_last:
            return False
        return self.repeat == 1 or layout.outer == self.channels

    @cached_property
    def statistics(self) -> tuple[int, ...]:
        """The shape of what there is one of for each channel of each group."""
        return (self.channels,) if self.groups == 1 else (self.groups, self.channels)

    @cached_property
    def columns(self) -> int:
        """Of what rows are taken as one: channels, so many times."""
        return self.channels * self.repeat

    @cached_property
    def width(self) -> int:
        """Values of a row, side by side."""
        return self.columns if self.channels_last else self.length

    @cached_property
    def blocks(self) -> int:
        """Programs beside each other over the columns."""
        return -(-self.columns // self.tile.columns)

    @cached_property
    def tiles(self) -> int:
        """Below each other, of a block in a group."""
        if self.channels_last:
            return -(-self.rows // self.tile.lanes)
        piece = self.tile.piece
        return -(-self.rows // (self.tile.lanes // piece)) * -(-self.length // piece)

    @cached_property
    def summed(self) -> int:
        """How many tiles a program sums."""
        return self._share(PROGRAMS, LONGEST_SUM)

    @cached_property
    def swept(self) -> int:
        """How many tiles a program of a sweep without sums has."""
        return self._share(SWEEPS, LONGEST_SWEEP)

    def _share(self, programs: int, longest: int) -> int:
        return min(-(-self.tiles * self.blocks * self.groups // programs), longest)


@lru_cache(maxsize=4096)
def plan_of(
    shape: tuple[int, ...], stride: tuple[int, ...], groups: int, itemsize: int
) -> Plan | None:
    """The plan of a tensor (n, c, *positions) with at least one value, if it can be walked."""
    layout = layout_of(shape, stride)
    if layout is None:
        return None
    n, c, *positions = shape
    rows, length, repeat = n // groups, math.prod(positions), 1
    if layout.channels_last:
        rows, length = rows * length, 1
        if layout.outer == c:
            widest = max(1, LINE // itemsize // c)
            repeat = max(k for k in range(1, widest + 1) if rows % k == 0)
            rows //= repeat
        across = _across(c * repeat, itemsize)
        tile = Tile(min(TILE // across, _power_of_two(rows)), across, 1)
    else:
        piece = _piece(length)
        tile = Tile(min(TILE // piece, _power_of_two(rows)) * piece, 1, piece)
    return Plan(
        shape=tuple(shape),
        channels_last=layout.channels_last,
        groups=groups,
        channels=c,
        rows=rows,
        length=length,
        repeat=repeat,
        itemsize=itemsize,
        tile=tile,
    )


@lru_cache(maxsize=4096)
def whole_plan_of(plan: Plan, operands: int) -> Plan | None:
    """The plan whose tiles hold all of a block of channels, where registers have room for it.

    `operands`: how many tensors they have to hold, one or two.
    """
    room = WHOLE[operands]
    rows = plan.rows * plan.repeat
    lanes = _power_of_two(rows)
    if not plan.channels_last:
        piece = _power_of_two(plan.length)
        tile = Tile(lanes * piece, 1, piece)
        return replace(plan, tile=tile) if tile.size <= room else None
    across = widest = _across(plan.channels, plan.itemsize)
    # large tiles leave the width to more programs, as long as no sector is read twice; then as
    # long as a thread's loads are full, for what was read lies in the cache
    while across * lanes > room or (across * lanes > TILE and across * plan.itemsize > SECTOR):
        across //= 2
    if across < min(VECTOR // plan.itemsize, widest):
        return None
    return replace(plan, rows=rows, repeat=1, tile=Tile(lanes, across, 1))


def _across(columns: int, itemsize: int) -> int:
    """How many columns a tile has: a line's, or fewer where many of those were empty."""
    line = LINE // itemsize
    if columns <= line:
        return _power_of_two(columns)
    return _fullest(columns, tuple(line // k for k in (1, 2, 4)))


def _piece(length: int) -> int:
    """How many positions side by side a tile has."""
    return _power_of_two(length) if length < PIECES[-1] else _fullest(length, PIECES)


def _fullest(size: int, choices: tuple[int, ...]) -> int:
    """The first that cuts `size` into pieces with few places empty, else that with the fewest."""

    def lost(piece: int) -> float:
        return 1 - size / (-(-size // piece) * piece)

    return next((piece for piece in choices if lost(piece) <= LOST), min(choices, key=lost))


def _power_of_two(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << (size - 1).bit_length()

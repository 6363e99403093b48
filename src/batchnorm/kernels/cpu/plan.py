"""How a tensor is walked: its family of loops, its blocks, and what makes a task.

Everything here follows from shapes and strides, never from the number of threads, so that the
same input gives the same bits for any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from batchnorm.kernels.layout import Layout, layout_of

__all__ = ["LARGEST_PITCH", "Plan", "plan_of"]

ROOM = 2048  # channels of a block, or columns, at most
MARGIN = 40  # between the arrays of a block's numbers, lest they share their cache sets
LARGEST_PITCH = ROOM + MARGIN
WIDTH = 512  # columns of a block whose values fit the cache
WIDE = 64  # columns: narrower rows are taken together
SHORT = 128  # positions: below, a sum over every row costs more than its values
PIECE = 4096  # values of a long row that are summed in one go
SLAB = 2**20  # bytes: a block's share of one tensor, so that the caches hold three
LARGEST_SLAB = 2**22  # above, two sweeps over the tensor are as fast
CACHED = 2**20  # bytes of a tensor that stays in the cores' caches whole
RUN = 128  # bytes that should lie side by side in a block
TASKS = 64
FEW = 8  # tasks are enough to share
TASK = 2**16  # values: less is not worth a task of its own
SEGMENT = 2**17  # values: each segment leaves two numbers for every channel


@dataclass(frozen=True, eq=False)  # one object a plan, so that looking it up is cheap
class Plan:
    """How the loops go over `groups` slices of a tensor; see rows.py and columns.py."""

    shape: tuple[int, ...]  # of the tensor
    family: str
    channels_last: bool
    groups: int
    channels: int
    count: int  # values of a channel in a group
    samples: int  # of a group; where channels are last, positions
    units: int  # what is cut into segments: samples, or pieces of long rows
    length: int  # positions side by side, which in columns is columns of a channel
    pieces: int  # of a long row
    piece: int  # values of a piece
    block: int  # channels of a task
    blocks: int
    segments: int  # of a group, where a channel is too large for one task
    repeat: int  # narrow rows taken as one, where they follow each other without a gap

    def fits(self, layout: Layout) -> bool:
        """Whether the loops can walk a tensor of that layout beside the one planned for."""
        if self.channels_last or layout.channels_last:
            return self.channels_last == layout.channels_last
        return self.family == "rows" or self.channels == 1 or layout.inner == self.length

    @property
    def is_fused(self) -> bool:
        """Whether a task has all of its channels' values, so that nobody has to be asked."""
        return self.segments == 1

    @cached_property
    def size(self) -> int:
        """Values of the whole tensor."""
        return self.groups * self.channels * self.count

    @cached_property
    def statistics(self) -> tuple[int, ...]:
        """The shape of what there is one of for each channel of each group."""
        return (self.channels,) if self.groups == 1 else (self.groups, self.channels)

    @cached_property
    def tasks(self) -> int:
        """What threads share: blocks of a group's channels, in segments."""
        return self.groups * self.blocks * self.segments

    @property
    def pitch(self) -> int:
        """From one array of a block's numbers to the next: one for each channel or column."""
        return self.block * (self.length * self.repeat if self.family == "columns" else 1) + MARGIN

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """In the order of library.PLAN."""
        return (
            *(self.groups, self.channels, self.samples, self.units, self.length),
            *(self.pieces, self.piece, self.block, self.blocks, self.segments, self.tasks),
            self.pitch,
        )


@lru_cache(maxsize=4096)
def plan_of(
    shape: tuple[int, ...], stride: tuple[int, ...], groups: int, itemsize: int, once: bool
) -> Plan | None:
    """The plan of a tensor (n, c, *positions) with at least one value, if it can be walked.

    `once`: for a kernel that goes over it once, so that it wins nothing by a block that stays in
    the cache.
    """
    layout = layout_of(shape, stride)
    if layout is None:
        return None
    n, c, *positions = shape
    length = math.prod(positions)
    samples, count = n // groups, n // groups * length
    in_columns = layout.channels_last or (length < SHORT and (c == 1 or layout.inner == length))
    if layout.channels_last:
        samples, length = count, 1
    pieces = 1 if in_columns else -(-length // PIECE)
    units = samples * pieces

    total, channel = count * c * groups, count * itemsize
    tasks = min(max(total // TASK, 1), FEW)
    block = min(SLAB // channel, -(-c // tasks))
    if in_columns:
        block = min(max(block, RUN // (length * itemsize)), WIDTH // length)
    block = max(1, min(block, c, ROOM))
    segments = 1
    scattered = layout.channels_last and (total * itemsize > CACHED or block < 2 * WIDE)
    too_few = -(-c // block) * groups < tasks // 2
    if once or scattered or too_few or block * channel > LARGEST_SLAB:
        block = max(1, min(c, ROOM // length if in_columns else ROOM))
        wanted = min(max(total // SEGMENT, 1), TASKS)
        segments = min(units, -(-wanted // (groups * -(-c // block))))
    block = -(-c // -(-c // block))  # as many blocks, of equal size
    blocks = -(-c // block)
    return Plan(
        shape=tuple(shape),
        family="columns" if in_columns else "rows",
        channels_last=layout.channels_last,
        groups=groups,
        channels=c,
        count=count,
        samples=samples,
        units=units,
        length=length,
        pieces=pieces,
        piece=-(-length // pieces),
        block=block,
        blocks=blocks,
        segments=segments,
        repeat=max(1, WIDE // (c * length)) if in_columns and blocks == 1 else 1,
    )

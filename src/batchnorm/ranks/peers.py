"""The ranks that share statistics: each one's numbers go to all of them, in one collective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.ranks.failure import failure
from batchnorm.ranks.naming import UNKNOWN, Caller
from batchnorm.ranks.step import step

__all__ = ["GraphPeers", "Peers", "size_of"]

# The first number that a rank sends holds its count of values, and which layer it is in.
_TAGS = 2**20
# A rank that is in another layer may send so many numbers more without harm: gloo ends a process
# that receives more than it has room for.
_ROOM = 2**15
_NOTHING = 0x7FF8_BAD0_BAD0_BAD0  # the bits of a NaN that no arithmetic makes


def size_of(group: dist.ProcessGroup | None) -> int:
    """How many ranks a group has, by default the default group; 1 where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


@dataclass(frozen=True, eq=False)
class Peers:
    """The ranks of a group, asked by one layer.

    Each method is one collective, which all ranks of the group must call. On the CPU every rank
    sends to every other at once: on gloo that takes less time than a ring does, and it
    shows who is in another layer. Elsewhere it is an all-gather or an all-reduce.

    Raises `SyncError` where a rank does not come, or comes from another layer; the running
    statistics of the step under way are put back.
    """

    group: dist.ProcessGroup | None
    caller: Caller = UNKNOWN

    def merged(self, mine: Moments) -> Moments:
        """The moments (c,) of all ranks' data, the same bits on each: 2c + 1 numbers are sent."""
        step.begin(self)
        rows = self._gathered(_packed(mine, self.caller.tag), "the forward of ")
        if self.caller.tag:
            differs = _differ(rows, self.caller.tag)
            if _is_direct(rows):
                self._raise_if(differs.nonzero().flatten().tolist(), "the forward of ")
            else:  # to look would wait for the device: what another layer sent becomes NaN
                rows[:, 1:].masked_fill_(differs.any(), torch.nan)
        return _unpacked(rows)

    def total(self, sums: Tensor) -> Tensor:
        """The sum of all ranks' numbers, which are the backward pass's."""
        step.go_back(self)
        if _is_direct(sums):
            return self._gathered(sums, "the backward of ").sum(0)
        total = sums.clone()
        with self._named_errors("the backward of "):
            dist.all_reduce(total, group=self.group)
        return total

    def _gathered(self, mine: Tensor, doing: str) -> Tensor:
        """Every rank's numbers (n,) → (ranks, n)."""
        size = size_of(self.group)
        if not _is_direct(mine):
            flat = mine.new_empty(size * mine.numel())
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            with self._named_errors(doing):
                gather(flat, mine, group=self.group)
            return flat.view(size, -1)
        n, room = mine.numel(), max(mine.numel() + 1, _ROOM)
        with self._named_errors(doing):
            me = dist.get_rank(self.group)
        sizes = [room] * size
        sizes[me] = n
        received = mine.new_empty(sum(sizes))  # of which what is not written takes no memory
        before = received[: me * room].view(me, room)
        after = received[me * room + n :].view(size - me - 1, room)
        ends = [part[:, n - 1 : n + 1].view(torch.int64) for part in (before, after)]
        for end in ends:
            end.fill_(_NOTHING)
        with self._named_errors(doing):
            dist.all_to_all_single(received, mine.repeat(size), sizes, [n] * size, group=self.group)
        last, beyond = torch.cat(ends).unbind(1)
        others = ((last == _NOTHING) | (beyond != _NOTHING)).nonzero().flatten().tolist()
        self._raise_if([rank + (rank >= me) for rank in others], doing)
        return torch.cat((before[:, :n], mine.unsqueeze(0), after[:, :n]))

    @contextmanager
    def _named_errors(self, doing: str) -> Iterator[None]:
        """Say of a collective that fails whose it was."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # the latter of a group that was destroyed
            step.undo()
            raise failure(self.group, doing + self.caller.name, error) from error

    def _raise_if(self, others: Sequence[int], doing: str) -> None:
        """Raise where ranks of the group were doing something else."""
        if others:
            step.undo()
            raise failure(self.group, doing + self.caller.name, None, others)


class GraphPeers(NamedTuple):
    """The same for a compiler's graph: functional collectives, and no look at what they bring.

    - `name`, `size`, `rank`: the group's name, how many ranks it has, and which this is.
    """

    name: str
    size: int
    rank: int

    def merged(self, mine: Moments) -> Moments:
        """The moments (c,) of all ranks' data, the same bits on each."""
        return _unpacked(self._gathered(_packed(mine, UNKNOWN.tag)))

    def total(self, sums: Tensor) -> Tensor:
        """The sum of all ranks' numbers."""
        if _is_direct(sums):
            return self._gathered(sums).sum(0)
        reduced = torch.ops._c10d_functional.all_reduce(sums, "sum", self.name)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
        return total

    def _gathered(self, mine: Tensor) -> Tensor:
        n = mine.numel()
        if not _is_direct(mine):
            gather = torch.ops._c10d_functional.all_gather_into_tensor
            flat = gather(mine, self.size, self.name)
        else:  # the collective of ranks that are not compiled, or not any more
            sizes = [n] * self.size
            flat = torch.ops._c10d_functional.all_to_all_single(
                mine.repeat(self.size), sizes, sizes, self.name
            )
        rows: Tensor = torch.ops._c10d_functional.wait_tensor(flat)
        return rows.view(self.size, n)


def _is_direct(tensor: Tensor) -> bool:
    """Whether each rank sends to every other: where memory is the CPU's, to be looked at."""
    return tensor.device.type == "cpu"


def _packed(moments: Moments, tag: int) -> Tensor:
    """(2c + 1,): the count, which all channels share, with the tag; the means; the m2."""
    first = moments.count[:1].to(moments.mean.dtype) * _TAGS + tag
    return torch.cat((first, moments.mean, moments.m2))


def _unpacked(rows: Tensor) -> Moments:
    """The moments of all ranks' (ranks, 2c + 1), merged in their order."""
    count, mean, m2 = rows.split((1, rows.shape[1] // 2, rows.shape[1] // 2), 1)
    count = (count / _TAGS).floor().to(torch.int64).expand(mean.shape)
    return Moments(count, mean, m2).pool(0)


def _differ(rows: Tensor, tag: int) -> Tensor:
    """Which ranks (ranks,) were in another layer, as far as they know."""
    tags = rows[:, 0].remainder(_TAGS)
    return (tags != tag) & (tags != UNKNOWN.tag)

"""What the notes of ranks that failed together say of the cause, in words."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

__all__ = ["Evidence", "Note", "Saw"]


class Saw(str, Enum):
    """How a rank noticed that a collective had failed."""

    LATE = "late"  # others did not come in time
    CLOSED = "closed"  # a connection was closed
    MIXED = "mixed"  # others sent what is not this layer's
    OTHER = "other"  # something in the backend


class Note(NamedTuple):
    """What a rank that failed tells the others.

    - `place`: what it was doing, "the forward of ResNet.bn1".
    - `words`: the backend's.
    """

    place: str
    saw: Saw
    words: str = ""


class Evidence(NamedTuple):
    """What one rank knows of a failure.

    - `ranks`, `me`: of the group, and this one.
    - `notes`: of the ranks that failed too, this one included.
    - `others`: the ranks that sent what is not this layer's.
    - `answered`: whether those that left no note could have been heard.
    """

    ranks: Sequence[int]
    me: int
    notes: Mapping[int, Note]
    others: Sequence[int] = ()
    answered: bool = True

    @property
    def knows_enough(self) -> bool:
        """Whether the others' notes would add nothing."""
        return self.notes[self.me].saw is Saw.OTHER

    def verdict(self) -> str:
        """The fact; the likely cause; what to do."""
        failed = {rank: note.words for rank, note in self.notes.items() if note.saw is Saw.OTHER}
        if self.me in failed:
            return failed[self.me]
        if failed:
            return "; ".join(f"on rank {rank}, {words}" for rank, words in failed.items())
        mine = self.notes[self.me]
        elsewhere = [r for r in self.ranks if r in self.notes and self.notes[r].place != mine.place]
        elsewhere += [rank for rank in self.others if rank not in self.notes]
        missing = [rank for rank in self.ranks if rank not in self.notes]
        if self.others or (elsewhere and not missing):
            there = self._places(elsewhere) or f"{_ranks(self.others)} sent another width of it"
            return f"{there}. {_elsewhere(mine)}"
        if not missing:
            return self._all_came()
        also = f"; {self._places(elsewhere)}" if elsewhere else ""
        if any(note.saw is Saw.LATE for note in self.notes.values()):
            return f"{_absent(missing, also)}. {_why_absent(missing, mine)}"
        return f"{_gone(missing, self.me, self.answered)}{also}. {_why_gone(missing)}"

    def _all_came(self) -> str:
        """Who did not wait in vain is whom the others waited for."""
        late = [rank for rank in self.ranks if self.notes[rank].saw is not Saw.LATE]
        if not 0 < len(late) < len(self.ranks):
            return "all ranks were there. The network between them failed"
        who = f"{_ranks(late)}, this one," if late == [self.me] else _ranks(late)
        them = "it" if len(late) == 1 else "them"
        return (
            f"{who} came later than the group's time limit allows. Find what held {them} up, or "
            "raise the limit, init_process_group(timeout=...)"
        )

    def _places(self, ranks: Sequence[int]) -> str:
        """`rank 1 was in the forward of a; ranks 2, 3 were in the forward of b`."""
        there = defaultdict(list)
        for rank in ranks:
            there[self.notes[rank].place if rank in self.notes else "another layer"].append(rank)
        return "; ".join(
            f"{_ranks(who)} {'was' if len(who) == 1 else 'were'} in {place}"
            for place, who in there.items()
        )


def _elsewhere(mine: Note) -> str:
    said = (
        "The ranks' models differ, or one of them skipped a layer, called one more, or has a part "
        "in eval mode"
    )
    return said + (", or left a layer out of its loss" if _is_backward(mine) else "")


def _absent(missing: Sequence[int], also: str) -> str:
    return f"{_ranks(missing)} did not come within the group's time limit{also}"


def _why_absent(missing: Sequence[int], mine: Note) -> str:
    it = "It" if len(missing) == 1 else "They"
    if _is_backward(mine):
        return (
            f"{it} may have left this layer out of the loss, have skipped the backward pass, hang, "
            "or be too slow. All ranks must go backward through the same layers; the limit is "
            "init_process_group(timeout=...)"
        )
    return (
        f"{it} may be in eval mode, have skipped this layer, be out of batches, hang, or be too "
        "slow. Give all ranks equally many batches (empty ones will do), or stop all when the "
        "first is out of them, Join(..., throw_on_early_termination=True); the limit is "
        "init_process_group(timeout=...)"
    )


def _gone(missing: Sequence[int], me: int, answered: bool) -> str:
    if answered or len(missing) == 1:
        return f"{_ranks(missing)} {'is' if len(missing) == 1 else 'are'} gone"
    if me == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"one of {_ranks(missing)} is gone; the store that tells which does not answer"
    return "rank 0 is gone, and with it the store that would tell of others"


def _why_gone(missing: Sequence[int]) -> str:
    it = "It" if len(missing) == 1 else "One of them"
    return (
        f"{it} died, was killed, or raised an error of its own, which its log tells; or it ended "
        "before the others, out of batches or in eval mode"
    )


def _is_backward(note: Note) -> bool:
    return note.place.startswith("the backward")


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))

"""A collective that failed: this rank's error, after asking the others what they saw."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch.distributed as dist

from batchnorm.ranks.store import Board, Patience
from batchnorm.ranks.verdict import Evidence, Note, Saw

__all__ = ["SyncError", "failure"]

# Those who fail together fail within moments of each other: one closes its connections, and
# the others notice.
_PATIENCE = 1.0  # seconds
_LOOK = 0.02

_failures: Counter[str] = Counter()  # by group: notes of an earlier failure are not this one's


class SyncError(RuntimeError):
    """Synchronized statistics could not be computed: a rank was missing, or in another layer.

    The message names the layer, the ranks, and the likely cause. (NCCL, whose collectives nobody
    waits for, ends the process instead, and layers mixed up become NaN.) The running statistics are
    those of the last complete step, see `undo_step`; the process group should not be used again.
    From a region that torch.compile has compiled, the backend's own error comes instead.
    """


def failure(
    group: dist.ProcessGroup | None, where: str, error: Exception | None, others: Sequence[int] = ()
) -> SyncError:
    """The error of this rank, after asking the others what they saw; takes up to 2 seconds.

    - `where`: what this rank was doing, "the forward of ResNet.bn1".
    - `error`: the backend's; None where all came, but `others` were doing something else.
    """
    try:
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        me = dist.get_rank()
    except (KeyError, RuntimeError, ValueError):
        return SyncError(
            f"{where} failed: its process group has been destroyed. Make the layer's policy anew, "
            "Sync(group), with a group that exists"
        )
    words = "" if error is None else _first_line(error)
    note = Note(where, _saw(error), words)
    evidence = Evidence(tuple(ranks), me, {me: note}, tuple(ranks[i] for i in others))
    told = _asked(group, evidence).verdict()
    all_of_them = f"{ranks[0]} to {ranks[-1]}" if _is_range(ranks) else ", ".join(map(str, ranks))
    words = f" ({words.split('. ')[0]})" if words and words not in told else ""
    return SyncError(
        f"{where} failed on rank {me} of {all_of_them}: {told}. The running statistics are those "
        f"of the last complete step; restart all ranks from their last checkpoint{words}"
    )


def _saw(error: Exception | None) -> Saw:
    """By how the backend says it: gloo's and NCCL's words."""
    said = str(error).lower()
    if error is None:
        return Saw.MIXED
    if re.search("timed out|timeout", said):
        return Saw.LATE
    gone = "closed by peer|reset by peer|broken pipe|remote process|read error|write error"
    return Saw.CLOSED if re.search(gone, said) else Saw.OTHER


def _asked(group: dist.ProcessGroup | None, mine: Evidence) -> Evidence:
    """With the others' notes; they are read in a thread, for a dead store may not answer."""
    notes, answered, done = dict(mine.notes), threading.Event(), threading.Event()

    def exchange() -> None:
        with suppress(Exception):  # without a store the error says less
            named = group if group is not None else dist.group.WORLD
            assert named is not None
            board = Board.of_group(named, "failure")
            name = str(_failures[named.group_name])
            _failures[named.group_name] += 1
            board.pin(name, json.dumps(mine.notes[mine.me]).encode())
            patience = Patience(0 if mine.knows_enough else _PATIENCE)
            while True:
                for i, rank in enumerate(mine.ranks):
                    if rank not in notes and (note := board.read(name, i)) is not None:
                        place, saw, words = json.loads(note)
                        notes[rank] = Note(place, Saw(saw), words)
                answered.set()  # also where the store goes with its rank later on
                if len(notes) == len(mine.ranks) or patience.is_over:
                    break
                time.sleep(_LOOK)
            board.pin(f"{name}/read", b"")
            if mine.me == 0:  # it may be the one that holds the store
                board.collect(f"{name}/read", patience)
        done.set()

    threading.Thread(target=exchange, daemon=True).start()
    done.wait(2 * _PATIENCE)
    return mine._replace(notes=dict(notes), answered=answered.is_set())


def _first_line(error: Exception) -> str:
    """Without the place in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^\]]*\] *", "", lines[0])[:300]


def _is_range(ranks: Sequence[int]) -> bool:
    return len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))

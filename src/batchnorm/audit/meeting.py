"""Ranks that torchrun started bring together what they found, in the launcher's store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from batchnorm.audit.finding import Ending, Report
from batchnorm.audit.merging import merged
from batchnorm.audit.rank_view import RankViews, Statistics
from batchnorm.audit.rules import RULES
from batchnorm.audit.rules.bn112_ranks_differ import disagreements
from batchnorm.audit.selection import Selection
from batchnorm.audit.wire import (
    TELLING,
    Note,
    packed,
    packed_statistics,
    unpacked,
    unpacked_statistics,
)
from batchnorm.ranks.store import Board, Patience

__all__ = ["GRACE", "Meeting"]

GRACE = 5.0  # seconds that a rank waits for the others when the run has failed

_NOTE, _STATISTICS, _REPORT, _PROCESS = "note", "statistics", "report", "process"


class Meeting:
    """The end of a watched run: every rank leaves a note, and one of them reads them all.

    That is rank 0; where it is gone when the run has failed, the first of the others to notice.
    The others do not wait for it: what they left stays.

    - `wait`: seconds that it waits for the others.

    Raises `RuntimeError` where the launcher does not answer, here and in every method.
    """

    def __init__(self, board: Board, wait: float) -> None:
        self._board = board
        self._patience: Patience | None = None
        self._wait = wait

    @classmethod
    def of_torchrun(cls, wait: float) -> Meeting | None:
        """The ranks that torchrun started; None where it started one or none."""
        board = Board.of_torchrun("run")
        if board is None:
            return None
        # of another round of the same attempt, which had other ranks
        for name in (_NOTE, _STATISTICS):
            board.take_down(name)
        if board.rank == 0:
            board.release(_REPORT)
            board.pin(_PROCESS, str(os.getpid()).encode())
        return cls(board, wait)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._board.rank

    def leave(self, note: Note, statistics: Mapping[str, Statistics]) -> None:
        """Tell what this rank found; then it may end."""
        if self.rank < TELLING:
            self._board.pin(_STATISTICS, packed_statistics(statistics))
        self._board.pin(_NOTE, packed(note))

    def reports(self, status: int | None) -> bool:
        """Whether this rank is the one that reports.

        - `status`: the exit status of its script; None where it was told to end.
        """
        if self.rank == 0:
            return self._board.claim(_REPORT)
        if status == 0:
            return False
        if status is None:
            self._board.await_claim(_REPORT, Patience(GRACE))
            self._wait = min(self._wait, 1.0)  # the others were told to end when this one was
        elif not self._first_is_gone():
            return False  # it will be told to end, and then report
        return self._board.claim(_REPORT)

    def hurry(self) -> None:
        """The run has failed: do not wait much longer."""
        self._wait = min(self._wait, GRACE)
        if self._patience is not None:
            self._patience.cut(GRACE)

    def report(self, own: Report, selection: Selection) -> Report:
        """One report of all ranks that left a note in time; measurements are of this rank."""
        self._patience = Patience(self._wait)
        notes = {rank: unpacked(note) for rank, note in self._notes(self._patience).items()}
        views = [note.view for note in notes.values()]
        differing = {d for each in disagreements(views) for d in each.digests.values()}
        ranks = RankViews(self._board.size, views, self._statistics(notes, differing))
        reports = {rank: note.report for rank, note in notes.items()} | {self.rank: own}
        return merged(reports, self.rank, ranks, RULES, selection, self._endings(notes))

    def _notes(self, patience: Patience) -> dict[int, bytes]:
        try:
            return self._board.collect(_NOTE, patience)
        except KeyboardInterrupt:  # told twice: wait no longer, and report
            return self._board.collect(_NOTE, Patience(0.0))

    def _statistics(self, ranks: Iterable[int], needed: set[str]) -> dict[str, Statistics]:
        """Of as few ranks as have them."""
        found: dict[str, Statistics] = {}
        for rank in ranks:
            if needed <= found.keys():
                break
            data = self._board.read(_STATISTICS, rank)
            if data is not None:
                told = unpacked_statistics(data)
                found |= {digest: told[digest] for digest in needed & told.keys()}
        return found

    def _endings(self, notes: Mapping[int, Note]) -> list[Ending]:
        """How ranks ended that did not end well."""
        endings = []
        for rank in range(self._board.size):
            note = notes.get(rank)
            if note is None:
                endings.append(Ending(rank, "no report: killed, hung, or still running"))
            elif note.view.status is None:
                endings.append(Ending(rank, "told to end (SIGTERM)", note.place))
            elif note.view.status:
                endings.append(Ending(rank, f"exit status {note.view.status}"))
        return endings

    def _first_is_gone(self) -> bool:
        """Whether rank 0 has died; None but its neighbours, on its machine, can tell."""
        if os.environ.get("GROUP_RANK") != "0":
            return False
        pid = self._board.read(_PROCESS, 0)
        return pid is not None and not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True  # a system without /proc
    return state != "Z"

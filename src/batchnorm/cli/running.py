"""A watched script's report: of one process, or of all ranks that torchrun started."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from batchnorm.audit import Probe, Report, Selection, Severity, run_script
from batchnorm.audit.meeting import Meeting
from batchnorm.audit.place import place_of
from batchnorm.audit.script import INTERRUPTED
from batchnorm.audit.wire import Note
from batchnorm.cli.options import Form
from batchnorm.cli.output import BAD_INPUT, complain, print_in_form, write_report
from batchnorm.cli.termination import before_termination, end_by_itself

__all__ = ["Telling", "run_on_ranks"]


@dataclass(frozen=True)
class Telling:
    """Where a report goes, and whether what it says counts as failure."""

    output: Path | None
    form: Form
    strict: bool

    def tell(self, report: Report, status: int, console: Console | None = None) -> int:
        """Print a report, write it, and return the exit status."""
        print_in_form(report, self.form, console or Console(file=sys.__stderr__))
        if self.output is not None:
            try:
                write_report(report, self.output)
            except OSError as error:
                complain(f"cannot write {self.output}: {error.strerror}")
                status = status or BAD_INPUT
        return 1 if self.strict and status == 0 and not report.is_clean else status

    def tell_alone(self, report: Report, status: int) -> int:
        """The same for a rank that does not know what the others found."""
        if _rank() == 0:
            return self.tell(report, status)
        # another rank's exit would end the first one's before it has reported
        if _has_more_to_say(report, status):
            print_in_form(report, self.form, Console(file=sys.__stderr__))
        return status


def run_on_ranks(
    script: Path,
    arguments: Sequence[str],
    selection: Selection,
    telling: Telling,
    wait: float,
) -> int:
    """Run a script, watched, and report; one report of all ranks that torchrun started.

    Returns the exit status. Raises `OSError` where the script cannot be read.
    """
    meeting = None
    with contextlib.suppress(RuntimeError):  # a launcher that does not answer is no launcher
        meeting = Meeting.of_torchrun(wait)
    if meeting is not None:
        return _Rank(meeting, selection, telling).run(script, arguments)
    status, report = run_script(script, arguments, selection)
    _flush()
    return telling.tell_alone(report, status)


class _Rank:
    """One of several ranks, which ends by itself or is told to end, and reports once."""

    def __init__(self, meeting: Meeting, selection: Selection, telling: Telling) -> None:
        self._meeting = meeting
        self._selection = selection
        self._telling = telling
        self._probe = Probe(selection=selection)
        self._ending = threading.Lock()  # of who ends this process; never released

    def run(self, script: Path, arguments: Sequence[str]) -> int:
        """Run the script, and return the exit status."""
        before_termination(self._told_to_end)
        status, report = run_script(script, arguments, probe=self._probe)
        self._ending.acquire()
        _flush()
        status = self._end(report, status)
        end_by_itself()
        return status

    def _told_to_end(self) -> bool:
        """Report in the script's stead, from another thread; whether the process is to end."""
        if not self._ending.acquire(blocking=False):
            self._meeting.hurry()
            return False  # the script has ended: its exit status stays what it is
        place = place_of(threading.main_thread().ident)
        self._end(self._probe.report(), None, place)
        return True

    def _end(self, report: Report, status: int | None, place: str | None = None) -> int:
        code = INTERRUPTED if status is None else status
        view, statistics = self._probe.view(self._meeting.rank, status)
        if status != 0:
            self._meeting.hurry()
        try:
            self._meeting.leave(Note(view, report, place), statistics)
            if not self._meeting.reports(status):
                return code
            report = self._meeting.report(report, self._selection)
        except RuntimeError:  # the launcher has gone
            return self._telling.tell_alone(report, code)
        if status is not None:
            return self._telling.tell(report, status)
        # not Python's own file, which the main thread may hold
        with open(2, "w", encoding=_encoding(), closefd=False) as file:
            return self._telling.tell(report, code, Console(file=file))


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # the script may have closed it
        sys.stdout.flush()


def _encoding() -> str:
    return "utf-8" if sys.__stderr__ is None else sys.__stderr__.encoding


def _rank() -> int:
    """Of this process among those that torchrun or another launcher started."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _has_more_to_say(report: Report, status: int) -> bool:
    """Whether another rank than the first may be the only one that met with what it found."""
    errors = any(finding.severity is Severity.ERROR for finding in report.findings)
    return errors or (status != 0 and bool(report.findings))

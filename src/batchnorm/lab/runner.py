"""Run claims: their trials over several processes, kept as they come, so that a run can go on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from batchnorm.lab.claim import AnyClaim, AnyTrial
from batchnorm.lab.conclusion import Conclusion, conclude
from batchnorm.lab.figures import to_svg
from batchnorm.lab.profile import Profile
from batchnorm.lab.record import Record, RecordError, record_path
from batchnorm.lab.results import Outcome
from batchnorm.report.files import write_atomically
from batchnorm.report.summary import count

__all__ = ["Failure", "Step", "cores", "draw", "run_claims"]

_BETWEEN_SAVES = 2.0  # seconds


@dataclass(frozen=True)
class Step:
    """How far a run has come: `done` of `total` trials of a claim.

    `again`: those of an earlier run are not kept, because the experiment has changed since.
    `conclusion`: with the last of them.
    """

    claim: type[AnyClaim]
    done: int
    total: int
    again: bool = False
    conclusion: Conclusion | None = None


@dataclass(frozen=True)
class Failure:
    """What raised: a trial or, of all of them, the conclusion. `trace`: where it did."""

    claim: type[AnyClaim]
    trial: AnyTrial | None
    reason: str
    trace: str

    @classmethod
    def of(cls, claim: type[AnyClaim], trial: AnyTrial | None, error: Exception) -> Failure:
        """Told by its exception."""
        trace = "".join(traceback.format_exception(error))
        return cls(claim, trial, f"{type(error).__name__}: {error}", trace)


@dataclass
class _Job:
    """A claim at work."""

    claim: type[AnyClaim]
    record: Record
    path: Path
    total: int
    waiting: int
    saved: float = 0.0
    conclusion: Conclusion | None = None

    def save(self) -> None:
        """Write what was measured; nothing that is made of it may lose it."""
        unfinished = {"verdict": None, "reason": f"{count(self.waiting, 'trial')} yet to run"}
        write_atomically(self.path, self.record.text(unfinished))
        self.saved = time.monotonic()

    def conclude(self) -> Conclusion:
        """Judge it, and where all has run write the answers and draw the figure."""
        conclusion = conclude(self.claim, self.record)
        if not conclusion.missing:
            write_atomically(self.path, self.record.text(conclusion.as_json()))
            draw(conclusion, self.path.parent)
        return conclusion


def run_claims(
    claims: Sequence[type[AnyClaim]],
    profile: Profile,
    directory: Path,
    *,
    device: str = "cpu",
    processes: int | None = None,
    notify: Callable[[Step], None] = lambda step: None,
) -> tuple[list[Conclusion], list[Failure]]:
    """Run what has not run yet, and conclude; results and figures lie in the directory.

    Each process computes on one thread, so that the same trial gives the same numbers on any
    number of them. What has run is saved every few seconds, and at the end whatever happens.

    Args:
        claims: What to run.
        profile: How much of it.
        directory: Of the results; those that are there are gone on with.
        device: What PyTorch calls it.
        processes: At work at once; by default one for each core.
        notify: Is told of every trial that has run, and of every claim at the beginning.

    Returns:
        A conclusion for each claim, and what raised; where it did stands in `failures.txt`.

    Raises:
        RecordError: The directory holds results of another profile or device, or something else;
            or another run writes into it.
        RuntimeError: A process died; what had run is saved.
        OSError: The directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        return _run(claims, profile, directory, device, processes, notify)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else writes results there meanwhile: each run holds in memory what it will write."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecordError(
            f"another run writes into {directory}; wait for it, or give another --output"
        ) from None
    try:
        yield
    finally:
        # before another can hold it, or there would be two locks
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _run(
    claims: Sequence[type[AnyClaim]],
    profile: Profile,
    directory: Path,
    device: str,
    processes: int | None,
    notify: Callable[[Step], None],
) -> tuple[list[Conclusion], list[Failure]]:
    jobs, waiting = [], []
    for claim in claims:
        path = record_path(directory, claim)
        record, again = _record(claim, path, profile, device)
        trials = list(claim().trials(profile))
        left = [trial for trial in trials if record.lacks(trial)]
        jobs.append(_Job(claim, record, path, len(trials), len(left)))
        waiting += [(jobs[-1], trial) for trial in left]
        notify(Step(claim, len(trials) - len(left), len(trials), again))
    failures: list[Failure] = []
    try:
        if waiting:
            _work_off(waiting, device, processes, notify, failures)
    finally:
        for job in jobs:
            if job.conclusion is None:
                job.save()
    conclusions = []
    for job in jobs:
        try:
            conclusions.append(job.conclusion or job.conclude())
        except RecordError:
            raise
        except Exception as error:
            failures.append(Failure.of(job.claim, None, error))
    told = directory / "failures.txt"
    told.unlink(missing_ok=True)
    if failures:
        write_atomically(told, "\n".join(f"{f.claim.name}: {f.trial}\n{f.trace}" for f in failures))
    return conclusions, failures


def draw(conclusion: Conclusion, directory: Path) -> Path:
    """Draw the figure of a claim beside its results."""
    path = directory / f"{conclusion.claim.name}.svg"
    write_atomically(path, to_svg(conclusion.claim().figure(conclusion.results)))
    return path


def _record(
    claim: type[AnyClaim], path: Path, profile: Profile, device: str
) -> tuple[Record, bool]:
    """What there is already; results of another make are put aside, which the second says."""
    new = Record.new(claim, profile.name, profile.seeds, device)
    if not path.exists():
        return new, False
    old = Record.load(path)
    for what in ("claim", "profile", "device"):
        have, want = getattr(old, what), getattr(new, what)
        if have != want:
            raise RecordError(
                f"{path} has results of the {what} {have}, not {want}; give another --output"
            )
    if old.fingerprint != new.fingerprint:
        path.rename(path.with_suffix(f".{old.fingerprint}.json"))
        return new, True
    old.seeds = profile.seeds
    return old, False


def _work_off(
    waiting: list[tuple[_Job, AnyTrial]],
    device: str,
    processes: int | None,
    notify: Callable[[Step], None],
    failures: list[Failure],
) -> None:
    number = min(processes or cores(), len(waiting))
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_start)
    try:
        futures: dict[Future[tuple[Outcome, float]], tuple[_Job, AnyTrial]] = {
            pool.submit(_work, job.claim, trial, device): (job, trial) for job, trial in waiting
        }
        for future in as_completed(futures):
            job, trial = futures[future]
            try:
                outcome, seconds = future.result()
                job.record.add(trial, outcome, seconds)
            except BrokenProcessPool:
                raise RuntimeError(
                    "a process died, perhaps for want of memory; what had run is saved: run again "
                    "to go on, with --processes 1 to need less"
                ) from None
            except Exception as error:
                failures.append(Failure.of(job.claim, trial, error))
            job.waiting -= 1
            if not job.waiting or time.monotonic() > job.saved + _BETWEEN_SAVES:
                job.save()
            if not job.waiting:
                with contextlib.suppress(Exception):  # told at the end, where it is tried again
                    job.conclusion = job.conclude()
            done = job.total - job.waiting
            notify(Step(job.claim, done, job.total, conclusion=job.conclusion))
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start() -> None:
    # who interrupts the run interrupts its processes: silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def _work(claim: type[AnyClaim], trial: AnyTrial, device: str) -> tuple[Outcome, float]:
    """One trial, in one of the processes."""
    begun = _core_seconds()
    torch.manual_seed(trial.seed)
    outcome = claim().run(trial, torch.device(device))
    return outcome, _core_seconds() - begun


def _core_seconds() -> float:
    """What this process and those it has waited for have used, however busy the machine is."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system

"""Ranks that die, raise, stay away or come late at random moments, and what becomes of the others.

    python benchmarks/faults.py [--faults 100] [--seed 0] [--output benchmarks/faults.md]

Two to four processes over gloo train a small network with four synchronized layers on
scikit-learn's digits, in float64 under DistributedDataParallel. In each run one rank has a fault,
of a random kind, in a random step, at a random point of it. Rank 0 saves a checkpoint after every
third step, from which a second run goes on. By chance, DistributedDataParallel broadcasts its
buffers or not, and rank 0 keeps the group's store or it outlives all ranks, as torchrun's does.

Counted is how the other ranks ended: with a `SyncError` that names the rank with the fault, or
others (rank 0 was gone, and its store); with an error of DistributedDataParallel's own
communication, after which they call `undo_step()`; or with their training complete, where the
rank was not needed any more. A rank that has not ended 2 seconds after the group's time limit, of
3 seconds, hangs; the longest wait is that of the step that failed.

"Statistics held": the parameters, running statistics and momenta of every rank that is left are
those of an undisturbed run after the last step that it completed, to the bit. "Resumed alike":
the run from the last checkpoint ends where the undisturbed one does, with two ranks to the bit,
with more within 1e-12: DistributedDataParallel adds up their gradients in another order in a
run's first step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from disturbed import (
    KINDS,
    LIMIT,
    OUTSIDE,
    STARTING,
    STEPS,
    Ended,
    Fault,
    Place,
    digits,
    load_kernels,
    process,
)  # fmt: skip
from numpy.typing import NDArray
from timing import machine

GRACE = 2.0  # seconds: what asking the others may take
PROCESSES = multiprocessing.get_context("fork")


class Run:
    """The processes of one training, with a fault or without."""

    def __init__(
        self, world: int, folder: Path, broadcast: bool, tcp: bool, fault: Fault | None = None
    ) -> None:
        (folder / "store").unlink(missing_ok=True)
        port = free_port() if tcp else None
        self.processes, self.pipes = [], []
        for rank in range(world):
            ours, theirs = PROCESSES.Pipe(duplex=False)
            place = Place(rank, world, folder, broadcast, port)
            started = PROCESSES.Process(target=process, args=(place, fault, theirs))
            started.start()
            theirs.close()
            self.processes.append(started)
            self.pipes.append(ours)
        for pipe in self.pipes:
            if not pipe.poll(STARTING):
                raise RuntimeError("a process does not start")
            pipe.recv()
        self.began = time.monotonic()

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def ends(self, longest: float) -> list[Ended | None]:
        """What each said at its end; None of those that were killed, or hang."""
        said = []
        for pipe in self.pipes:
            try:
                came = pipe.poll(max(0.0, self.began + longest - time.monotonic()))
                said.append(pipe.recv() if came else None)
            except EOFError:
                said.append(None)
        self.seconds = time.monotonic() - self.began
        for each in self.processes:
            each.join(max(0.0, self.began + longest - time.monotonic()))
        self.hang = [each.is_alive() for each in self.processes]
        for each in self.processes:
            each.kill()
            each.join()
        return said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Undisturbed(NamedTuple):
    digests: dict[int, str]
    held: NDArray[np.float64]
    seconds: float


class Study:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self.tally: dict[str, Counter[str]] = defaultdict(Counter)
        self.longest: dict[str, float] = defaultdict(float)
        self.odd: list[str] = []
        self._straight: dict[tuple[int, bool], Undisturbed] = {}

    def undisturbed(self, world: int, broadcast: bool) -> Undisturbed:
        if (world, broadcast) not in self._straight:
            self._straight[world, broadcast] = self._undisturbed(world, broadcast)
        return self._straight[world, broadcast]

    def _undisturbed(self, world: int, broadcast: bool) -> Undisturbed:
        run = Run(world, self._new_folder(), broadcast, False)
        ends = run.ends(STARTING)
        assert all(end is not None and end.digests == ends[0].digests for end in ends)
        return Undisturbed(ends[0].digests, ends[0].held, run.seconds)

    def one(self, numbers: random.Random) -> None:
        """A fault, what becomes of the others, and the training after it."""
        world, broadcast = numbers.choice((2, 3, 4)), numbers.random() < 0.5
        tcp = numbers.random() < 0.3
        fault = Fault.drawn(numbers, world)
        straight = self.undisturbed(world, broadcast)
        while True:
            folder = self._new_folder()
            run = Run(world, folder, broadcast, tcp, fault)
            if fault.kind == OUTSIDE:
                time.sleep(fault.moment * straight.seconds)
                run.kill(fault.rank)
            ends = run.ends(straight.seconds + 2 * LIMIT + GRACE + 10)
            if fault.kind != OUTSIDE or ends[fault.rank] is None:
                break
            fault = fault._replace(moment=numbers.random())  # it had ended
        tally = self.tally[fault.kind]
        tally["faults"] += 1
        left = [(rank, end) for rank, end in enumerate(ends) if end is not None]
        for rank, end in enumerate(ends):
            if rank != fault.rank:
                tally[self._how(fault, end, run.hang[rank])] += 1
                tally["others"] += 1
                if end is not None:
                    self.longest[fault.kind] = max(self.longest[fault.kind], end.waited)
        held = all(end.digest == straight.digests[end.done] for _, end in left)
        tally["held"] += held
        resumed = Run(world, folder, broadcast, tcp).ends(STARTING)
        alike = all(
            end is not None
            and end.done == STEPS
            and abs(end.held - straight.held).max() <= (0 if world == 2 else 1e-12)
            for end in resumed
        )
        tally["alike"] += alike
        strange = [
            end.message
            for rank, end in left
            if rank != fault.rank and self._how(fault, end, False) == OTHER
        ]
        if not (held and alike) or any(run.hang) or strange:
            self.odd.append(f"{fault} of {world}: held {held}, alike {alike}, {strange}")

    def _how(self, fault: Fault, end: Ended | None, hang: bool) -> str:
        if hang or (end is not None and end.waited > LIMIT + GRACE):
            return HANG
        if end is None:
            return OTHER
        if not end.error:
            return COMPLETE
        if end.error == "SyncError":
            verdict = end.message.split(": ", 1)[1].split(". The running statistics")[0]
            names = re.findall(r"\branks? (\d+(?:, \d+)*)", verdict)
            blamed = {int(n) for each in names for n in each.split(", ")}
            return NAMED if fault.rank in blamed else ELSE
        return DDP if "gloo" in end.message or "pair closure" in end.message else OTHER

    def _new_folder(self) -> Path:
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir()
        return folder


NAMED, ELSE, DDP = "named", "another named", "DDP"
COMPLETE, HANG, OTHER = "complete", "hang", "other"


def table(study: Study) -> list[str]:
    head = (
        "fault", "faults", "other ranks", "`SyncError` naming it", "naming another", "DDP's error",
        "complete", "another error", "hang", "longest wait, s", "statistics held", "resumed alike",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    total: Counter[str] = Counter()
    for kind in KINDS:
        if kind in study.tally:
            total += study.tally[kind]
            lines.append(row(kind, study.tally[kind], study.longest[kind]))
    return [*lines, row("all", total, max(study.longest.values()))]


def row(name: str, tally: Counter[str], longest: float) -> str:
    counts = [tally[each] for each in ("faults", "others", NAMED, ELSE, DDP, COMPLETE, OTHER, HANG)]
    all_of = [f"{tally[each]} of {tally['faults']}" for each in ("held", "alike")]
    return "| " + " | ".join([name, *map(str, counts), f"{longest:.1f}", *all_of]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the processes are forked, without other threads
    digits()
    load_kernels()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder))
        numbers = random.Random(args.seed)  # noqa: S311 - nothing secret
        for _ in range(args.faults):
            study.one(numbers)
    lines = ["# Faults", "", (__doc__ or "").split("\n\n", 2)[2], machine(), ""]
    lines += [*table(study), "", f"Seed {args.seed}; {time.perf_counter() - start:.0f} seconds."]
    lines += ["", *study.odd]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

"""Real processes of which some die: what each that is left says, and when."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from processes import forked, free_port, start_server

STARTING = 60.0  # seconds that a busy machine may need to start them


@dataclass(frozen=True)
class Outcome:
    """How a rank's process ended, and what it said before.

    - `code`: its exit status; minus the signal's number, where one killed it.
    - `said`: what `work` returned; None if it did not.
    - `error`, `message`: what it raised, if it did: the type's name, and the text.
    - `seconds`: from when all ranks were ready until it returned or raised.
    """

    code: int
    said: Any = None
    error: str = ""
    message: str = ""
    seconds: float = float("nan")
    trace: str = field(default="", repr=False)


def outcomes(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    limit: float = 3,
    within: float = 30,
    first_keeps_store: bool = False,
) -> list[Outcome]:
    """Call `work(rank, world, *args)` in `world` processes over gloo, and wait for all of them.

    Its result must be JSON's.

    - `limit`: the process group's, in seconds.
    - `within`: seconds after which a rank that has not ended hangs, an `AssertionError`.
    - `first_keeps_store`: whether rank 0 holds the group's store; else this process does, as
      torchrun's does.
    """
    start_server()
    ready = forked.Barrier(world)
    port = free_port()
    store = None if first_keeps_store else _store(port, True)
    ranks = []
    for rank in range(world):
        ours, theirs = forked.Pipe(duplex=False)
        meeting = _Meeting(rank, world, port, first_keeps_store and rank == 0, limit, ready)
        process = forked.Process(target=_rank, args=(meeting, theirs, work, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    end = time.monotonic() + STARTING + within
    try:
        return [_outcome(process, pipe, end) for process, pipe in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
        del store


def die() -> NoReturn:
    """As the kernel kills for want of memory: no word to anybody."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class _Meeting(NamedTuple):
    rank: int
    world: int
    port: int
    keeps_store: bool
    limit: float
    ready: Any

    def join(self) -> None:
        """Begin the process group; its limit is none for starting."""
        if self.keeps_store:
            store = _store(self.port, True)
        self.ready.wait(STARTING)
        if not self.keeps_store:
            store = _store(self.port, False)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=self.limit),
        )
        dist.barrier()


def _store(port: int, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False)


def _rank(meeting: _Meeting, pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting.join()
    start = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        told["said"] = work(meeting.rank, meeting.world, *args)
    except BaseException as error:  # a Ctrl-C too
        told |= {"error": type(error).__name__, "message": str(error)}
        told["trace"] = traceback.format_exc()
    told["seconds"] = time.perf_counter() - start
    pipe.send_bytes(json.dumps(told).encode())
    pipe.close()


def _outcome(process: Any, pipe: Any, end: float) -> Outcome:
    told: dict[str, Any] = {}
    with contextlib.suppress(EOFError):  # it was killed
        if pipe.poll(end - time.monotonic()):
            told = json.loads(pipe.recv_bytes())
    process.join(max(0, end - time.monotonic()))
    assert process.exitcode is not None, "a rank hangs"
    return Outcome(process.exitcode, **told)

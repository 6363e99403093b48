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
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from processes import free_port

# one process loads what all others need, and forks them
_processes = get_context("forkserver")
_processes.set_forkserver_preload(["warmed"])

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
    world: int, work: Callable[..., Any], *args: Any, limit: float = 3, within: float = 30
) -> list[Outcome]:
    """Call `work(rank, world, *args)` in `world` processes over gloo, and wait for all of them.

    Its result must be JSON's. `limit` is the process group's, in seconds; who is not at its end
    `within` seconds hangs, and raises `AssertionError` here.
    """
    _start_server()
    ready = _processes.Barrier(world)
    port = free_port()
    ranks = []
    for rank in range(world):
        ours, theirs = _processes.Pipe(duplex=False)
        process = _processes.Process(
            target=_rank, args=(rank, world, port, limit, ready, theirs, work, args)
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    end = time.monotonic() + STARTING + within
    try:
        return [_outcome(process, pipe, end) for process, pipe in ranks]
    finally:
        for process, _ in ranks:
            process.kill()


def _start_server() -> None:
    """It must find the module that it loads; before Python 3.13 it does not get `sys.path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def die() -> NoReturn:
    """As the kernel kills for want of memory: no word to anybody."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _rank(
    rank: int, world: int, port: int, limit: float, ready: Any, pipe: Any, work: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    ready.wait(STARTING)  # the group's limit is none for starting
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=limit),
    )
    dist.barrier()
    start = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        told["said"] = work(rank, world, *args)
    except BaseException as error:  # a Ctrl-C too
        told |= {"error": type(error).__name__, "message": str(error)}
        told["trace"] = traceback.format_exc()
    told["seconds"] = time.perf_counter() - start
    pipe.send_bytes(json.dumps(told).encode())
    pipe.close()
    if dist.is_initialized() and "error" not in told:
        dist.destroy_process_group()


def _outcome(process: Any, pipe: Any, end: float) -> Outcome:
    told: dict[str, Any] = {}
    with contextlib.suppress(EOFError):  # it was killed
        if pipe.poll(end - time.monotonic()):
            told = json.loads(pipe.recv_bytes())
    process.join(max(0, end - time.monotonic()))
    assert process.exitcode is not None, "a rank hangs"
    return Outcome(process.exitcode, **told)

"""Real processes that communicate: one function on every rank, over gloo on this machine."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessRaisedException

__all__ = ["run_on_ranks"]

LIMIT = 600.0  # seconds: a busy machine may take long to start them


def run_on_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` new processes of a process group.

    ```python
    answers = run_on_ranks(work, 2, images, labels)     # def work(rank, world, images, labels)
    ```

    Args:
        function: At the top level of a module, which the processes import, and which should
            therefore import little.
        world: How many processes, of one thread each.
        args: Pickled.

    Returns:
        What each rank's call gave, as JSON holds it.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank raised; the others are ended. It
            says what the first one raised, not what others did when they lost it.
        TimeoutError: They took more than ten minutes, and are ended.
    """
    with TemporaryDirectory() as name:
        directory = Path(name)
        spawn: Any = vars(mp)["spawn"]  # it ships no types
        context = spawn(_rank, (world, directory, function, args), nprocs=world, join=False)
        try:
            end = time.monotonic() + LIMIT
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    raise TimeoutError(f"{world} ranks took more than {LIMIT:.0f} seconds")
        except ProcessRaisedException:
            first = _first_error(directory)
            if not first.exists():
                raise
            raise ProcessRaisedException(*json.loads(first.read_text())) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [json.loads(_answer(directory, rank).read_text()) for rank in range(world)]


def _answer(directory: Path, rank: int) -> Path:
    return directory / f"{rank}.json"


def _first_error(directory: Path) -> Path:
    return directory / "error.json"


def _say_if_first(directory: Path, rank: int) -> None:
    """Leave the words of the exception being handled, whole, unless another rank has."""
    words = directory / f"{rank}.error.json"
    words.write_text(json.dumps([f"rank {rank}: {traceback.format_exc()}", rank, os.getpid()]))
    with suppress(FileExistsError):
        _first_error(directory).hardlink_to(words)


def _rank(
    rank: int, world: int, directory: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT),
    )
    try:
        _answer(directory, rank).write_text(json.dumps(function(rank, world, *args)))
        dist.barrier()  # who leaves early takes the meeting place along
    except Exception:
        _say_if_first(directory, rank)  # before the others lose the connection, and raise too
        raise
    finally:
        gc.collect()  # a reducer in a cycle goes before its process group
        dist.destroy_process_group()

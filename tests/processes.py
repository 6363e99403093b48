"""Real processes for distributed tests: gloo on loopback, one function on every rank."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

PORT_FREE = 0

# one process loads what all others need, and forks them
forked = get_context("forkserver")
forked.set_forkserver_preload(["warmed"])


def start_server() -> None:
    """It must find the module that it loads; before Python 3.13 it does not get `sys.path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", PORT_FREE))
        return s.getsockname()[1]


def _worker(rank: int, world: int, port: int, work: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        work(rank, world, *args)
    finally:
        gc.collect()  # a reducer in a cycle must go before its process group
        dist.destroy_process_group()


def run_ranks(world: int, work: Callable, *args) -> None:
    """Call `work(rank, world, *args)` in `world` processes; raise what any of them raised."""
    start_server()
    words = (world, free_port(), work, args)
    mp.start_processes(_worker, words, nprocs=world, start_method="forkserver")


def in_a_process(code: str, **variables: str) -> str:
    """What a fresh Python prints that runs the code, with variables added to its environment."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

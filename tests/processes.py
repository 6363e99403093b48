"""Real processes for distributed tests: gloo on loopback, one function on every rank."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable

import torch.distributed as dist
import torch.multiprocessing as mp

PORT_FREE = 0


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
    mp.spawn(_worker, (world, free_port(), work, args), nprocs=world)

"""Measure what the layers' collectives take between these processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from batchnorm.moments import Moments
from batchnorm.planning.network import Network, fitted
from batchnorm.planning.traffic import Backend, Traffic, backward, forward
from batchnorm.ranks import Peers, Ranks
from batchnorm.statistics import Sync

__all__ = ["CHANNELS", "Timing", "measure_collectives", "measure_network", "traffic_of"]

CHANNELS = (1, 64, 512, 2048, 16384)  # the last for the bandwidth: no layer has as many
CALLS = 10  # one after the other, as layers are

Timing = tuple[int, int, Literal["forward", "backward"], float]
"""Ranks in a group, channels, which collective, and its seconds."""


def measure_network(*, rounds: int = 9) -> Network:
    """The network between the ranks of the default group, for `plan(..., network=...)`.

    Collectives of layers of 1 to 16,384 channels are timed in groups of neighbouring ranks, of
    each size that divides the world and is a power of two, and in the whole world, while nothing
    else runs. All ranks must call this; all get the same. `Network` is fitted to the slowest
    rank's medians.

    Raises `ValueError` without a process group on gloo or NCCL, and for a world that has no two
    sizes of groups, of fewer than 4 ranks or a prime number of them.
    """
    timings = measure_collectives(rounds=rounds)
    backend = _backend()
    world = dist.get_world_size()
    return fitted(
        f"{backend} between {world} ranks, measured", backend, traffic_of(timings, backend)
    )


def traffic_of(timings: list[Timing], backend: Backend) -> list[tuple[Traffic, float]]:
    """The timings by what a rank sent."""
    return [
        (forward(channels, k) if which == "forward" else backward(channels, k, backend), seconds)
        for k, channels, which, seconds in timings
    ]


def measure_collectives(*, rounds: int = 9, sizes: Sequence[int] = ()) -> list[Timing]:
    """The medians that `measure_network` fits, of the slowest rank.

    - `sizes`: of the groups; by default those that `measure_network` names.
    """
    device = "cpu" if _backend() == "gloo" else f"cuda:{torch.cuda.current_device()}"
    world = dist.get_world_size()
    if not sizes:
        sizes = [k for k in range(2, world + 1) if world % k == 0 and _is_usual(k, world)]
    work = {
        (k, channels, which): done
        for k in sizes
        for channels in CHANNELS
        for which, done in _collectives(k, channels, device)
    }
    seconds: dict[tuple[int, int, Literal["forward", "backward"]], list[float]]
    seconds = {key: [] for key in work}
    for i in range(rounds + 2):
        for key, done in work.items():
            _finish(device)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                done()
            _finish(device)
            if i >= 2:  # connections, buffers
                seconds[key].append((time.perf_counter() - start) / CALLS)
    mine = [statistics.median(each) for each in seconds.values()]
    slowest = [max(ranks) for ranks in zip(*Ranks().gather(mine), strict=True)]
    return [(*key, took) for key, took in zip(work, slowest, strict=True)]


def _collectives(
    k: int, channels: int, device: str
) -> list[tuple[Literal["forward", "backward"], Callable[[], object]]]:
    """A layer's in groups of k, as it calls them."""
    peers = Peers(Sync.groups_of(k).process_group)
    values = torch.zeros(channels, dtype=torch.float64, device=device)
    moments = Moments(torch.ones_like(values, dtype=torch.int64), values, values)
    sums = values.repeat(2)
    return [("forward", lambda: peers.merged(moments)), ("backward", lambda: peers.total(sums))]


def _is_usual(k: int, world: int) -> bool:
    """Whether groups of k are measured: a power of two, or all."""
    return k & (k - 1) == 0 or k == world


def _backend() -> Literal["gloo", "nccl"]:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group to measure; start several processes with torchrun, and "
            "call torch.distributed.init_process_group()"
        )
    backend = dist.get_backend()
    if backend == "gloo":
        return "gloo"
    if backend == "nccl":
        return "nccl"
    raise ValueError(f"only gloo and NCCL are modelled, got a process group on {backend}")


def _finish(device: str) -> None:
    """Wait for what was asked of a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()

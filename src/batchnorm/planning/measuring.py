"""Measure what synchronizing layers takes between these processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.layers import BatchNorm1d
from batchnorm.planning.network import Network, fitted
from batchnorm.planning.traffic import Backend, Traffic, backward, forward
from batchnorm.ranks import Ranks
from batchnorm.statistics import Batch, Statistics, Sync

__all__ = ["CHANNELS", "Timing", "measure_layers", "measure_network"]

CHANNELS = (1, 64, 512, 2048, 16384)  # the last for the bandwidth: no layer has as many
LAYERS = 10  # one after the other, as in a network
SHORTEST = 1e-7  # seconds: where the noise is larger than what is measured


class Timing(NamedTuple):
    """What synchronizing one layer in a group of ranks adds to a forward and backward pass."""

    group: int
    channels: int
    seconds: float

    def traffic(self, backend: Backend) -> Traffic:
        """What a rank sends meanwhile."""
        both = forward(self.channels, self.group)
        return both + backward(self.channels, self.group, backend)


def measure_network(*, rounds: int = 9) -> Network:
    """The network between the ranks of the default group, for `plan(..., network=...)`.

    Layers of 1 to 16,384 channels and few samples are timed, synchronized in groups of
    neighbouring ranks and not synchronized, forward and backward. Groups are of each size that
    divides the world and is a power of two, and the whole world; of all that divide it, where it
    is odd. `Network` is fitted to the
    differences, medians of the slowest rank: what a collective takes where a layer asks for it,
    which is more than where one follows the other. All ranks must call this, with
    nothing else running; all get the same.

    Raises `ValueError` without a process group on gloo or NCCL, and for a world that has no two
    sizes of groups, of fewer than 4 ranks or a prime number of them.
    """
    timings, backend = measure_layers(rounds=rounds), _backend()
    name = f"{backend} between {dist.get_world_size()} ranks, measured"
    return fitted(name, backend, [(t.traffic(backend), t.seconds) for t in timings])


def measure_layers(*, rounds: int = 9, sizes: Sequence[int] = ()) -> list[Timing]:
    """The medians that `measure_network` fits, of the slowest rank.

    - `sizes`: of the groups; by default those that `measure_network` names.
    """
    device = "cpu" if _backend() == "gloo" else f"cuda:{torch.cuda.current_device()}"
    world = dist.get_world_size()
    sizes = sizes or _sizes(world)
    plain = {channels: _pass(Batch(), channels, device) for channels in CHANNELS}
    work = {
        (k, channels): (_pass(Sync.groups_of(k), channels, device), plain[channels])
        for k in sizes
        for channels in CHANNELS
    }
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in work}
    for i in range(rounds + 2):
        for key, (ours, other) in work.items():
            added = _seconds(ours, device) - _seconds(other, device)
            if i >= 2:  # connections, buffers
                seconds[key].append(added / LAYERS)
    mine = [statistics.median(each) for each in seconds.values()]
    slowest = [max(ranks) for ranks in zip(*Ranks().gather(mine), strict=True)]
    return [Timing(*key, max(took, SHORTEST)) for key, took in zip(work, slowest, strict=True)]


def _pass(statistics: Statistics, channels: int, device: str) -> Callable[[], object]:
    """Forward and backward through layers of such a policy."""
    layers = [BatchNorm1d(channels, device=device, statistics=statistics) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, channels, device=device, requires_grad=True)
    return lambda: model(x).sum().backward()


def _seconds(work: Callable[[], object], device: str) -> float:
    """From when all ranks are there to when this one has finished."""
    dist.barrier()
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def _sizes(world: int) -> list[int]:
    """Of the groups that are measured."""
    sizes = [k for k in range(2, world + 1) if world % k == 0]
    return [k for k in sizes if k & (k - 1) == 0 or k == world] if world % 2 == 0 else sizes


def _backend() -> Backend:
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

"""Training one network on several ranks, each with a shard of its own.

The processes of `run_on_ranks` import this, and therefore little else is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import convert, reduce_statistics

__all__ = ["Job", "train_on_rank", "train_together"]


@dataclass(frozen=True)
class Job:
    """What is trained: a network, on shards of data, at several rates.

    `arm`: whose statistics: "own", each rank's; "first", the first rank's, which
    DistributedDataParallel gives to all; or "sync". `asked`: images to be classified after the
    training.
    """

    network: nn.Module
    arm: str
    shards: list[tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"]]]
    asked: Float[Tensor, "m *shape"]
    rates: tuple[float, ...]
    steps: int
    batch: int
    seed: int


def _batches(n: int, job: Job, rank: int) -> Iterator[Tensor]:
    """A rank's batches, drawn anew for each."""
    generator = torch.Generator().manual_seed(1_000_003 * rank + job.seed)
    for _ in range(job.steps):
        yield torch.randperm(n, generator=generator)[: job.batch]


def _answers(network: nn.Module, x: Tensor) -> list[int]:
    with torch.no_grad():
        found: list[int] = network.eval()(x).argmax(1).tolist()
    return found


def _learn(network: nn.Module, drawn: Iterator[tuple[Tensor, Tensor]], rate: float) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    network.train()
    for x, y in drawn:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()


def train_on_rank(rank: int, world: int, job: Job) -> dict[str, list[list[int]]]:
    """Train at every rate, gradients averaged over the ranks.

    Returns:
        For every rate what the network answers in inference on this rank: "apart", as it was
        trained, and "merged", after `reduce_statistics`.
    """
    x, y = job.shards[rank]
    shared = "forward_sync_buffers"  # since PyTorch 2.13
    if shared not in signature(DistributedDataParallel).parameters:
        shared = "broadcast_buffers"
    options: dict[str, Any] = {shared: job.arm == "first"}
    apart, merged = [], []
    for rate in job.rates:
        network = deepcopy(job.network)
        if job.arm == "sync":
            convert(network, to="sync")
        wrapped = DistributedDataParallel(network, **options)
        drawn = ((x[chosen], y[chosen]) for chosen in _batches(len(x), job, rank))
        _learn(wrapped, drawn, rate)
        apart.append(_answers(network, job.asked))
        # a run that has diverged has nothing to merge, and all ranks have to know it
        finite = torch.tensor(float(all(b.isfinite().all() for b in network.buffers())))
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            reduce_statistics(network)
        merged.append(_answers(network, job.asked))
    return {"apart": apart, "merged": merged}


def train_together(job: Job) -> dict[str, list[list[int]]]:
    """The same in one process: every batch is what the ranks' batches are together."""
    answers = []
    for rate in job.rates:
        network = deepcopy(job.network)
        ranks = [_batches(len(x), job, rank) for rank, (x, _) in enumerate(job.shards)]
        drawn = (
            tuple(
                torch.cat([part[i][c] for part, c in zip(job.shards, chosen, strict=True)])
                for i in (0, 1)
            )
            for chosen in zip(*ranks, strict=True)
        )
        _learn(network, ((x, y) for x, y in drawn), rate)
        answers.append(_answers(network, job.asked))
    return {"apart": answers, "merged": answers}

"""Synchronized layers on gloo: a step's time and bytes against unsynchronized ones and a peer's.

    python benchmarks/sync.py [--output benchmarks/sync.md]

The peers are detectron2's NaiveSyncBatchNorm, which gathers E[x] and E[x²] of every rank in one
collective and all-reduces their gradients in another, and the same with two all-reduces each way.
All batch norms of ResNet-18 and of a ResNet-50, in their order, forward and backward: alone, on
noise of their inputs' shapes, and inside the whole network with its convolutions. Each rank has
4 images of 64×64 and one thread. Candidates are timed in turns in the same processes, each after a
barrier, and a step takes as long as its slowest rank does: medians with the 20th and 80th
percentile of the rounds' ratios. Gradients of parameters are not reduced.
The processes are on one machine, over loopback. Where there are more of them than
cores, they also wait for a core: compare within a row.
Bytes are what each rank sends, by the collectives that a step calls, in the
algorithms that gloo uses: rings for all-gather and all-reduce.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import OurNorm, TorchNorm, network
from timing import KEPT, machine, ratio
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.planning.measuring import CHANNELS, Timing, measure_layers
from batchnorm.planning.network import Network, fitted
from batchnorm.planning.traffic import NOTHING, Traffic, all_reduce, exchange
from batchnorm.ranks import Peers

WORLDS = (1, 2, 4, 8)
NETWORKS = {"ResNet-18": "ResNet-18", "ResNet-50": "bottlenecks, as ResNet-50"}
BATCH, SIZE = 4, 64
FEWEST, MOST, ROUNDS = 5, 25, 9  # rounds of steps, and of collectives
PLAIN, OURS, ONE, TWO = "unsynchronized", "ours", "detectron2's", "two all-reduces"
SYNCHRONIZED = (OURS, ONE, TWO)
c10d = torch.ops.c10d


class Gathered(torch.autograd.Function):
    """The sum over the ranks as fvcore's `differentiable_all_reduce` computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.stack(rows).sum(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dist.all_reduce(dy)
        return dy


class Reduced(torch.autograd.Function):
    """The same by all-reduces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        total = dy.clone()
        dist.all_reduce(total)
        return total


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """What detectron2's layer of that name computes, by default, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_world_size() == 1 or not self.training:
            return super().forward(x)
        mean, square = self.summed(x.mean([0, 2, 3]), (x * x).mean([0, 2, 3]))
        var = square - mean * mean
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        self.running_var += self.momentum * (var.detach() - self.running_var)
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    def summed(self, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        both = Gathered.apply(torch.cat((mean, square))) * (1 / dist.get_world_size())
        return torch.split(both, len(mean))


class TwoAllReduces(NaiveSyncBatchNorm):
    def summed(self, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        return tuple(Reduced.apply(each) / dist.get_world_size() for each in (mean, square))


class OurSyncNorm(OurNorm):
    def __init__(self, channels: int, act: bool) -> None:
        super().__init__(channels, act)
        self.norm.statistics = batchnorm.Sync()


class PeerNorm(TorchNorm):
    layer: type[nn.Module] = NaiveSyncBatchNorm

    def __init__(self, channels: int, act: bool) -> None:
        super().__init__(channels, act)
        self.norm = self.layer(channels)


class TwoNorm(PeerNorm):
    layer = TwoAllReduces


NORMS = {PLAIN: OurNorm, OURS: OurSyncNorm, ONE: PeerNorm, TWO: TwoNorm}


def shapes(name: str) -> list[tuple[int, ...]]:
    """Of the inputs of a network's batch norms, in their order."""
    found: list[tuple[int, ...]] = []
    model, _ = network(NETWORKS[name], OurNorm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, given: found.append(tuple(given[0].shape)))
    with torch.no_grad():
        model(torch.randn(BATCH, 3, SIZE, SIZE))
    return found


def alone(name: str, kind: str) -> Callable[[], list[Tensor]]:
    """All batch norms of a network, forward and then backward; returns what they answer."""
    torch.manual_seed(dist.get_rank())  # the same tensors for every kind
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes(name)]
    gradients = [torch.randn_like(x) for x in inputs]
    layers = [NORMS[kind](x.shape[1], False) for x in inputs]
    leaves = [*inputs, *(p for layer in layers for p in layer.parameters())]

    def step() -> list[Tensor]:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.autograd.grad(outputs, leaves, gradients)  # from the last to the first
        return outputs

    return step


def whole(name: str, kind: str) -> Callable[[], list[Tensor]]:
    """A step of the whole network; returns its loss."""
    torch.manual_seed(0)
    model, _ = network(NETWORKS[name], NORMS[kind])
    torch.manual_seed(dist.get_rank())
    x, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))

    def step() -> list[Tensor]:
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        return [loss]

    return step


PARTS = {"batch norms alone": alone, "whole network": whole}


class Counted(TorchDispatchMode):
    """What this rank sends in the collectives of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = NOTHING

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, world = func.overloadpacket, dist.get_world_size()
        if name is c10d.allreduce_:
            self.sent += all_reduce(world, sum(x.nbytes for x in args[0]))
        elif name is c10d.allgather_:
            self.sent += exchange(world, sum(x.nbytes for x in args[1]))
        elif name is c10d.alltoall_base_:
            self.sent += exchange(world, args[1].nbytes / world)
        elif func.namespace in ("c10d", "_c10d_functional"):
            raise NotImplementedError(f"bytes of {func} are not counted")
        return func(*args, **(kwargs or {}))


def sent(step: Callable[[], object]) -> Traffic:
    with Counted() as counted:
        step()
    return counted.sent


def rounds_in(seconds: float, work: Iterable[Callable[[], object]]) -> int:
    """How many rounds take so long; the same on all ranks."""
    dist.barrier()
    start = time.perf_counter()
    for step in work:
        step()
    wanted = [max(FEWEST, min(MOST, int(seconds / (time.perf_counter() - start))))]
    dist.broadcast_object_list(wanted)
    return wanted[0]


def steps(seconds_each: float) -> list[dict[str, Any]]:
    """Every network and part: seconds of each round's slowest rank, and what a rank sends."""
    rows = []
    world = dist.get_world_size()
    for name in NETWORKS:
        for part, make in PARTS.items():
            work = {kind: make(name, kind) for kind in NORMS}
            answers = {kind: step()[-1] for kind, step in work.items()}
            for kind in (ONE, TWO) if world > 1 else (OURS,):
                torch.testing.assert_close(answers[kind], answers[OURS], rtol=1e-3, atol=1e-3)
            traffic = {kind: asdict(sent(step)) for kind, step in work.items()}
            seconds: dict[str, list[float]] = {kind: [] for kind in NORMS}
            order = list(work.items())
            for _ in range(rounds_in(seconds_each, work.values())):
                order.reverse()
                for kind, step in order:
                    dist.barrier()
                    start = time.perf_counter()
                    step()
                    seconds[kind].append(time.perf_counter() - start)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, seconds)
            slowest = {
                kind: [max(ranks) for ranks in zip(*(s[kind] for s in everyone), strict=True)]
                for kind in NORMS
            }
            rows.append(
                {
                    "network": name,
                    "part": part,
                    "world": world,
                    "seconds": slowest,
                    "sent": traffic,
                }
            )
    return rows


def collectives() -> list[tuple[int, str, int, float]]:
    """World, which, channels, seconds: collectives alone, one following the other."""
    world, found = dist.get_world_size(), []
    for channels in CHANNELS:
        x = torch.zeros(2 * channels)
        rows, sums, peers = [torch.zeros_like(x) for _ in range(world)], x.double(), Peers(None)
        work = {
            "exchange": lambda peers=peers, sums=sums: peers.total(sums),
            "all_gather": lambda rows=rows, x=x: dist.all_gather(rows, x),
            "all_reduce": lambda x=x: dist.all_reduce(x),
        }
        for which, done in work.items():
            times = []
            for _ in range(ROUNDS + 2):
                dist.barrier()
                start = time.perf_counter()
                for _ in range(10):
                    done()
                times.append((time.perf_counter() - start) / 10)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, statistics.median(times[2:]))
            found.append((world, which, channels, max(everyone)))
    return found


def worker(rank: int, world: int, port: int, seconds: float, output: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    result: dict[str, Any] = {"steps": steps(seconds)}
    if world > 1:
        result["layers"] = measure_layers(rounds=ROUNDS, sizes=(world,))
        result["collectives"] = collectives()
    if rank == 0:
        Path(output).write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(world: int, seconds: float) -> dict[str, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        mp.spawn(worker, (world, port, seconds, str(output)), nprocs=world)
        return json.loads(output.read_text())


def share(world: int, cores: int) -> float:
    """How many processes there are to a core."""
    return max(1.0, world / cores)


def network_of(results: dict[str, Any]) -> Network:
    """The network that layers show, of ranks with a core of their own.

    Of k processes on fewer cores each waits for the others: their times are divided by the
    processes to a core.
    """
    timings = [Timing(*timing) for timing in results["layers"]]
    measured = [
        (timing.traffic("gloo"), timing.seconds / share(timing.group, results["cores"]))
        for timing in timings
    ]
    fit = fitted("", "gloo", measured)
    rounded = [float(f"{x:.3g}") for x in (fit.collective, fit.message, fit.byte)]
    return Network("gloo over loopback", "gloo", *rounded)


def step_table(results: dict[str, Any], part: str) -> list[str]:
    lines = [
        "| batch norms of | processes | unsynchronized, ms | ours / unsynchronized "
        "| detectron2's / unsynchronized | two all-reduces / unsynchronized "
        "| detectron2's / ours | two all-reduces / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        if row["part"] == part:
            s = row["seconds"]
            cells = [row["network"], str(row["world"]), f"{1e3 * statistics.median(s[PLAIN]):.1f}"]
            cells += [ratio(s[kind], s[PLAIN]) for kind in SYNCHRONIZED]
            cells += [ratio(s[kind], s[OURS]) for kind in (ONE, TWO)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def traffic_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| batch norms of | processes | ours: collectives | kB "
        "| detectron2's: collectives | kB | two all-reduces: collectives | kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        if row["part"] == "batch norms alone" and row["world"] > 1:
            assert row["sent"][PLAIN]["collectives"] == 0
            cells = [row["network"], str(row["world"])]
            for kind in SYNCHRONIZED:
                traffic = row["sent"][kind]
                cells += [str(traffic["collectives"]), f"{traffic['bytes'] / 1e3:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def collective_table(results: dict[str, Any]) -> list[str]:
    """Of each layer, beside what the fitted model says, and of collectives alone."""
    fit, cores = network_of(results), results["cores"]
    alone = {(world, which, c): seconds for world, which, c, seconds in results["collectives"]}
    lines = [
        "| processes | channels | a layer's two, µs | model, µs | exchange alone, µs "
        "| all-gather alone, µs | all-reduce alone, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for timing in (Timing(*each) for each in results["layers"]):
        world, channels = timing.group, timing.channels
        times = [
            timing.seconds,
            fit.seconds(timing.traffic("gloo")) * share(world, cores),
            *(alone[world, which, channels] for which in ("exchange", "all_gather", "all_reduce")),
        ]
        cells = [str(world), str(channels), *(f"{1e6 * t:.0f}" for t in times)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text_of(results: dict[str, Any]) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2]
    fit = network_of(results)
    lines = [f"# Synchronized layers\n\n{results['machine']}\n\n{about}"]
    for part in PARTS:
        lines += [f"## A step's time: {part}", "", *step_table(results, part), ""]
    lines += [
        "## What each rank sends in a step",
        "",
        "Ours sends float64, the peers float32.",
        "",
        *traffic_table(results),
        "",
        "## What a collective takes",
        "",
        "First what synchronizing a layer adds to its forward and backward pass, of few samples "
        "and in a row of layers, with its two exchanges, of 2c + 1 and 2c float64 numbers. The "
        f"model is fitted to that: {1e6 * fit.collective:.4g} µs a collective, "
        f"{1e6 * fit.message:.4g} µs a message to another rank, "
        f"{1e9 * fit.byte:.3g} ns a byte, times the processes to a core. "
        "`batchnorm.planning.LOOPBACK` holds these numbers. Then collectives alone, one following "
        "the other, which takes less time than where a layer waits for each: our exchange of 2c "
        "float64 numbers, the peer's collectives of 2c float32.",
        "",
        *collective_table(results),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=18, help="about, for each step's rounds")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument(
        "--output", type=Path, help="write the tables here, and what they are made of as .json"
    )
    args = parser.parse_args()
    os.environ.update(KEPT)  # of the processes that are started
    start = time.perf_counter()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    results: dict[str, Any] = {"machine": f"{machine()}, {cores} cores", "cores": cores}
    for world in args.worlds:
        for key, rows in measured(world, args.seconds).items():
            results.setdefault(key, []).extend(rows)
    text = text_of(results)
    print(text)
    fit = network_of(results)
    print(f"LOOPBACK: collective={fit.collective}, message={fit.message}, byte={fit.byte}")
    print(f"took {time.perf_counter() - start:.0f} s")
    if args.output is not None:
        args.output.write_text(text)
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

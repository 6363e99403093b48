"""What a collective takes: so much at all, so much a message, so much a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from batchnorm.planning.traffic import Backend, Traffic

__all__ = ["INFINIBAND", "LOOPBACK", "NVLINK", "Network", "fitted"]


@dataclass(frozen=True)
class Network:
    """The time of collectives: α for each, λ for each message of a rank, β for each byte.

    seconds = α·collectives + λ·messages + β·bytes

    That is Hockney's model (1994, "The communication challenge for MPP") with the messages of
    one collective apart from it, since those of an exchange are under way at the same time.

    - `name`: where the numbers come from, for people to read.
    - `backend`: "gloo" or "nccl", which says by what messages the numbers travel.
    - `collective`, `message`, `byte`: α, λ and β, in seconds.

    Raises `ValueError` for a number that is negative or not finite.
    """

    name: str
    backend: Backend
    collective: float
    message: float
    byte: float

    def __post_init__(self) -> None:
        for what in ("collective", "message", "byte"):
            value = getattr(self, what)
            if not 0 <= value < float("inf"):
                raise ValueError(f"seconds a {what} are a number from 0 up, got {value}")

    def seconds(self, traffic: Traffic) -> float:
        """How long it takes."""
        return (
            self.collective * traffic.collectives
            + self.message * traffic.messages
            + self.byte * traffic.bytes
        )

    @property
    def bandwidth(self) -> float:
        """Bytes a second, of one rank."""
        return 1 / self.byte if self.byte else float("inf")


def fitted(name: str, backend: Backend, measured: Sequence[tuple[Traffic, float]]) -> Network:
    """The network whose model is nearest to what collectives took: `(traffic, seconds)`.

    Least squares of the relative errors, Σ (model / measured − 1)², over numbers that are not
    negative.

    Raises `ValueError` where collectives of fewer than two numbers of messages were measured:
    what a collective takes and what a message takes cannot be told apart.
    """
    if len({traffic.messages / traffic.collectives for traffic, _ in measured}) < 2:
        raise ValueError(
            "collectives of one group size do not tell α from λ; measure two sizes: start four "
            "processes or more, and not a prime number of them"
        )
    rows = [
        [traffic.collectives / took, traffic.messages / took, traffic.bytes / took]
        for traffic, took in measured
    ]
    # of so few numbers the best that are not negative are the best of some of them alone
    matrix, ones = torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows), 1).double()
    scale = matrix.square().sum(0).sqrt()
    best, numbers = float("inf"), torch.zeros(3, dtype=torch.float64)
    for size in (3, 2, 1):
        for columns in map(list, combinations(range(3), size)):
            solved = torch.linalg.lstsq(matrix[:, columns] / scale[columns], ones).solution
            error = float((matrix[:, columns] / scale[columns] @ solved - ones).square().sum())
            if (solved >= 0).all() and error < best:
                best = error
                numbers = torch.zeros(3, dtype=torch.float64)
                numbers[columns] = solved.squeeze(1) / scale[columns]
    collective, message, byte = numbers.tolist()
    return Network(name, backend, collective, message, byte)


LOOPBACK = Network(
    "gloo over loopback, 2 to 8 processes on 2 cores of an AMD EPYC (benchmarks/sync.md)",
    "gloo",
    collective=1.55e-3,
    message=138e-6,
    byte=1.62e-9,
)
"""What benchmarks/sync.py measured and wrote into benchmarks/sync.json."""

NVLINK = Network(
    "NCCL's own estimates for NVLink inside a node, not measured here",
    "nccl",
    collective=6.6e-6,
    message=0.6e-6,
    byte=1 / 87.7e9,
)
"""A ring with the protocol for few bytes (LL): NVIDIA/nccl, src/graph/tuning.cc, on Hopper."""

INFINIBAND = Network(
    "NCCL's own estimates for a ring over 400 Gb/s InfiniBand, not measured here",
    "nccl",
    collective=6.6e-6,
    message=2.7e-6,
    byte=4 / 50e9,
)
"""The same where every hop crosses the network; LL carries a quarter of its bandwidth."""

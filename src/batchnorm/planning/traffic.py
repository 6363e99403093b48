"""What a rank sends to synchronize a layer: collectives, messages and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["NOTHING", "Backend", "Traffic", "all_reduce", "backward", "exchange", "forward"]

Backend = Literal["gloo", "nccl"]

BYTES = 8.0  # of a number: statistics travel as float64


@dataclass(frozen=True)
class Traffic:
    """What one rank sends: in so many collectives, so many messages, so many bytes of payload.

    It receives as much. Messages are counted one after the other, as a rank posts them; `bytes`
    are what the algorithm sends on average, where ranks differ by a remainder.
    """

    collectives: int
    messages: int
    bytes: float

    def __add__(self, other: Traffic) -> Traffic:
        """Both."""
        return Traffic(
            self.collectives + other.collectives,
            self.messages + other.messages,
            self.bytes + other.bytes,
        )

    def times(self, number: int) -> Traffic:
        """As much so many times."""
        return Traffic(self.collectives * number, self.messages * number, self.bytes * number)


NOTHING = Traffic(0, 0, 0.0)


def exchange(ranks: int, payload: float) -> Traffic:
    """Every rank's bytes to every other: (k − 1) messages, (k − 1)·payload bytes.

    An exchange (gloo's all-to-all) and a ring (gloo's and NCCL's all-gather) send as much, the
    one to all at once, the other from neighbour to neighbour.
    """
    return NOTHING if ranks == 1 else Traffic(1, ranks - 1, (ranks - 1) * payload)


def all_reduce(ranks: int, payload: float) -> Traffic:
    """A ring's all-reduce: 2(k − 1) messages, 2(k − 1)/k·payload bytes."""
    if ranks == 1:
        return NOTHING
    return Traffic(1, 2 * (ranks - 1), 2 * (ranks - 1) / ranks * payload)


def forward(channels: int, ranks: int) -> Traffic:
    """Of one call of a layer: count, means and m2 to every other rank, 2c + 1 numbers."""
    return exchange(ranks, (2 * channels + 1) * BYTES)


def backward(channels: int, ranks: int, backend: Backend) -> Traffic:
    """Of its backward pass: two sums a channel, exchanged on gloo, all-reduced on NCCL."""
    collective = exchange if backend == "gloo" else all_reduce
    return collective(ranks, 2 * channels * BYTES)

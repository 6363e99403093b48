"""Examples with their targets, in three parts, and drawn in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = ["Examples", "Split", "batches", "split"]


@dataclass(frozen=True)
class Examples:
    """Inputs and their targets: labels, the numbers of a regression, or symbols for symbols."""

    x: Shaped[Tensor, "n *shape"]
    y: Shaped[Tensor, "n *target"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, chosen: slice | Tensor) -> Examples:
        return Examples(self.x[chosen], self.y[chosen])

    def to(self, device: torch.device) -> Examples:
        """The same on a device."""
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Split:
    """What is learned from, what learning rates are chosen by, and what is reported."""

    train: Examples
    validation: Examples
    test: Examples

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return Split(self.train.to(device), self.validation.to(device), self.test.to(device))


def split(
    x: Float[Tensor, "n *shape"],
    y: Shaped[Tensor, "n *target"],
    *,
    validation: int,
    test: int,
    seed: int,
) -> Split:
    """Three parts without overlap, the order drawn from the seed."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = Examples(x[order], y[order])
    rest = len(x) - validation - test
    return Split(whole[:rest], whole[rest : rest + validation], whole[rest + validation :])


def batches(n: int, size: int, seed: int) -> Iterator[Int[Tensor, " size"]]:
    """The indices of batches without end: every epoch in a new order, without its smaller rest.

    Raises:
        ValueError: A batch is larger than the whole.
    """
    if not 0 < size <= n:
        raise ValueError(f"a batch has from 1 to all {n} of the examples, got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].split(size)

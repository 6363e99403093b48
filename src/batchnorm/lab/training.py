"""Training and evaluating, the same for all arms of an experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from batchnorm.lab.data import Examples, batches

__all__ = ["Run", "accuracy", "error", "evaluated", "hits", "train"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """What was noted of a training run.

    `losses`: of every step. `marks`: at each noted step, its number and what `note` gave.
    `diverged`: it was ended by a loss that is no number.
    """

    losses: list[float] = field(default_factory=list)
    marks: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False

    def first(self, reaches: Callable[[float], bool]) -> int | None:
        """The first noted step whose note does; None if none does."""
        return next((step for step, value in self.marks if reaches(value)), None)


def train(
    network: nn.Module,
    examples: Examples,
    *,
    rate: float,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    momentum: float = 0.9,
    decay: float = 0.0,
    warm_up: int = 0,
    clip: float | None = None,
    loss: Loss = F.cross_entropy,
    note: Callable[[nn.Module], float] | None = None,
    every: int = 10,
    until: Callable[[float], bool] | None = None,
    order: Iterator[Tensor] | None = None,
) -> Run:
    """Train a network by stochastic gradient descent with momentum.

    Args:
        network: In any mode; it is left in training mode.
        examples: What it learns.
        rate: The learning rate.
        steps: How many.
        batch: Samples of a step.
        seed: Of the order of the samples.
        momentum: Of the gradients.
        decay: Of the weights.
        warm_up: Steps over which the rate rises linearly to its value.
        clip: The largest norm of a step's gradient.
        loss: Of outputs and targets.
        note: What to measure of the network, after every so many steps.
        every: How many.
        until: Ends the training where a note is so.
        order: The indices of each step's batch; shuffled ones of `batch` samples by default.
    """
    optimizer = torch.optim.SGD(
        network.parameters(), lr=rate, momentum=momentum, weight_decay=decay
    )
    run = Run()
    drawn = order or batches(len(examples), batch, seed)
    network.train()
    for step in range(1, steps + 1):
        part = examples[next(drawn).to(examples.x.device)]
        if warm_up:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / warm_up)
        optimizer.zero_grad()
        value = loss(network(part.x), part.y)
        run.losses.append(float(value.detach()))
        if not math.isfinite(run.losses[-1]):
            run.diverged = True
            break
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        if note is not None and (step % every == 0 or step == steps):
            run.marks.append((step, note(network)))
            if until is not None and until(run.marks[-1][1]):
                break
    return run


@torch.no_grad()
def evaluated(
    network: nn.Module,
    x: Float[Tensor, "n *shape"],
    *,
    mode: str = "eval",
    batch: int | None = None,
) -> Float[Tensor, "n *outputs"]:
    """Outputs for inference; the network's mode is left as it was.

    Args:
        network: Its running statistics are used, unless `mode` is "train", which moves them.
        x: Inputs.
        mode: "eval" or "train".
        batch: Samples at a time; all at once by default.
    """
    was = network.training
    network.train(mode == "train")
    try:
        return torch.cat([network(part) for part in x.split(batch or len(x))])
    finally:
        network.train(was)


def hits(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """The share of labels that have the largest logit."""
    return float((logits.argmax(1) == labels).double().mean())


def accuracy(network: nn.Module, examples: Examples) -> float:
    """The share of examples classified right, in inference."""
    return hits(evaluated(network, examples.x), examples.y)


def error(network: nn.Module, examples: Examples) -> float:
    """The percentage of examples classified wrong, in inference."""
    return 100 * (1 - accuracy(network, examples))

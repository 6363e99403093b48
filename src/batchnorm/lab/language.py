"""Training and evaluating a model of language, the same for all arms of an experiment."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from batchnorm.lab.data import CHARACTERS, Text
from batchnorm.lab.training import Run

__all__ = ["KNOWS_NOTHING", "nats", "train_language"]

KNOWS_NOTHING = math.log(CHARACTERS)
"""The loss of a model to which all characters are equally likely; what diverged counts as it."""

_CLIP = 1.0


def _loss(network: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train_language(
    network: nn.Module,
    part: Int[Tensor, " n"],
    *,
    rate: float,
    steps: int,
    batch: int = 32,
    length: int = 32,
    seed: int = 0,
) -> Run:
    """Train a network to predict each next character, by Adam, with gradients clipped to norm 1.

    Args:
        network: From (n, length) characters to logits; it is left in training mode.
        part: The text.
        rate: The learning rate.
        steps: How many.
        batch: Windows of a step.
        length: Characters of a window.
        seed: Of the windows' places.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    run = Run()
    network.train()
    for _ in range(steps):
        starts = torch.randint(len(part) - length, (batch,), generator=generator).to(part.device)
        value = _loss(network, Text.windows(part, length, starts))
        run.losses.append(float(value.detach()))
        if not math.isfinite(run.losses[-1]):
            run.diverged = True
            break
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        optimizer.step()
    return run


@torch.no_grad()
def nats(
    network: nn.Module, part: Int[Tensor, " n"], *, length: int = 32, windows: int = 512
) -> float:
    """The mean loss a character in inference, over windows evenly spread; `KNOWS_NOTHING` at most.

    Args:
        network: Its mode is left as it was.
        part: The text.
        length: Characters of a window.
        windows: How many.
    """
    starts = torch.linspace(0, len(part) - length - 1, windows).long().to(part.device)
    was = network.training
    network.eval()
    try:
        value = float(_loss(network, Text.windows(part, length, starts)))
    finally:
        network.train(was)
    return min(value, KNOWS_NOTHING) if math.isfinite(value) else KNOWS_NOTHING

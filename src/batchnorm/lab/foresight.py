"""What an autoregressive model makes of the future, which it must not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from batchnorm import frozen_statistics
from batchnorm.lab.data import Examples

__all__ = ["loss_by", "moved", "read_ahead", "reading", "surprise", "with_other_future"]


@contextmanager
def reading(network: nn.Module, mode: str) -> Iterator[None]:
    """A mode, "train" or "eval", in which nothing is learned or recorded."""
    was = network.training
    network.train(mode == "train")
    with frozen_statistics(network), torch.no_grad():
        yield
    network.train(was)


def surprise(
    logits: Float[Tensor, "n length symbols"], following: Int[Tensor, "n length"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of what follows, in nats a symbol."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def loss_by(
    network: nn.Module,
    examples: Examples,
    *,
    mode: str,
    batch: int,
    places: slice = slice(None),
) -> float:
    """Nats a symbol, so many windows at a time, of all places or of some."""
    with reading(network, mode):
        parts = zip(examples.x.split(batch), examples.y.split(batch), strict=True)
        losses = [float(surprise(network(x)[:, places], y[:, places])) for x, y in parts]
    return sum(losses) / len(losses)


def with_other_future(x: Int[Tensor, "n length"], cut: int, batch: int) -> Int[Tensor, "n length"]:
    """Windows whose characters from a cut on are those of the next batch's windows."""
    return torch.cat([x[:, :cut], x.roll(-batch, 0)[:, cut:]], 1)


def moved(
    network: nn.Module, x: Int[Tensor, "n length"], cut: int, *, mode: str, batch: int
) -> float:
    """How far logits before a cut move when the text from it on becomes another batch's.

    The largest movement, over the largest logit; 0 is 0 to the bit.
    """
    pairs = zip(x.split(batch), with_other_future(x, cut, batch).split(batch), strict=True)
    with reading(network, mode):
        found = [(network(own)[:, :cut], network(other)[:, :cut]) for own, other in pairs]
    largest = max(float(own.abs().max()) for own, _ in found)
    return max(float((own - other).abs().max()) for own, other in found) / largest


def read_ahead(
    network: nn.Module, examples: Examples, cuts: Sequence[int], *, mode: str, batch: int
) -> float:
    """What a character's own future tells of it, in nats, more than another batch's future does.

    Each character at a cut is predicted from those before it, with its own text from the cut on
    and with another's. A model that sees the past alone gains nothing.
    """
    gains = []
    with reading(network, mode):
        for cut in cuts:
            other = with_other_future(examples.x, cut, batch)
            parts = (each.split(batch) for each in (examples.x, other, examples.y))
            for mine, others, y in zip(*parts, strict=True):
                with_own, with_other = (
                    float(surprise(network(x)[:, cut - 1 : cut], y[:, cut - 1 : cut]))
                    for x in (mine, others)
                )
                gains.append(with_other - with_own)
    return sum(gains) / len(gains)

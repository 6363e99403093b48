"""How much the statistics of batches move what is normalized with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchnorm.moments import Moments

__all__ = ["FEWEST", "Noise", "noise"]

FEWEST = 4  # batches below which their spread is not known


@dataclass(frozen=True)
class Noise:
    """By how many standard deviations a batch's own statistics move an output, with its error.

    Root mean square over channels. Statistics of n independent normal values give √(1.5/n).
    """

    value: float
    error: float


def noise(batches: list[Moments], eps: float) -> Noise | None:
    """The noise of batch statistics, from the differences between one batch and the next.

    An output (x − μ)/σ moves by the error of μ in standard deviations, and by its own size times
    the error of log σ; the squares of both, averaged over channels, are noise². Half the squared
    difference of neighbours estimates them (von Neumann 1941) where the weights drift meanwhile
    too, which a spread around the mean of all would count as noise.

    None for fewer than 4 batches.
    """
    if len(batches) < FEWEST:
        return None
    var = Moments.merge(batches).var()
    sigma = (var + eps).sqrt()
    heard = var > eps / 10  # a silent channel's statistics are ε's
    means = torch.stack([b.mean for b in batches]) / sigma
    logs = torch.stack([(b.var() + eps).log() for b in batches]) / 2
    squares = (means.diff(dim=0).square() + logs.diff(dim=0).square())[:, heard] / 2
    if squares.numel() == 0:
        return Noise(0.0, 0.0)
    each = squares.mean(1)
    value = float(each.mean().sqrt())
    # neighbouring differences share a batch: for normal values that makes the error √1.5 larger
    error = float((1.5 * each.var() / len(each)).sqrt())
    return Noise(value, error / (2 * value) if value else 0.0)

"""How far statistics are from those of batches, and how much of it is sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["Distance", "apart", "between", "distance"]

LARGEST_SHIFT = 0.5  # of a standard deviation
LARGEST_STRETCH = 1.5  # of the standard deviation, either way


@dataclass(frozen=True)
class Distance:
    """How far statistics are from those of batches, root mean square over channels.

    `shift` is in standard deviations of the batches; `stretch` is the ratio of the standard
    deviations, as its logarithm. Each has the standard error that sampling gives it.
    """

    shift: float
    shift_error: float
    stretch: float
    stretch_error: float

    @property
    def stretch_factor(self) -> float:
        """The ratio of the standard deviations, 1 or more."""
        return math.exp(self.stretch)

    @property
    def is_harmful(self) -> bool:
        """Whether one of them is large, and is still with twice its error taken off."""
        small = (
            self.shift - 2 * self.shift_error <= LARGEST_SHIFT
            and self.stretch - 2 * self.stretch_error <= math.log(LARGEST_STRETCH)
        )
        return not small  # running statistics that are no numbers are not small


def distance(
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    batches: list[Moments],
    momentum: float | None,
    eps: float,
) -> Distance:
    """The distance of a running mean and variance from the batches' means and variances.

    The sampling error comes from the spread between the batches: of their average, s/√k, and of
    a running average with momentum m, s·√(m/(2 − m)), which together are what two honest
    estimates of the same number differ by.
    """
    k = len(batches)
    pooled = Moments.merge(batches)
    # what a running variance averages: not the spread between batches of different kinds
    within = torch.stack([b.m2 / (b.count - 1).clamp(min=1) for b in batches]).mean(0)
    m = momentum or 0.0
    share = 1 / k + m / (2 - m)
    # by the larger spread: a channel that was silent in these few batches has none of its own
    sigma = (torch.maximum(within, var) + eps).sqrt()
    shift = (mean - pooled.mean) / sigma
    means = torch.stack([b.mean for b in batches]) / sigma
    # and what a silent channel's variance should be, these batches do not say
    heard = within > eps / 10
    stretch = ((var + eps).log() - (within + eps).log())[heard] / 2
    logs = torch.stack([(b.var() + eps).log()[heard] / 2 for b in batches])
    return Distance(
        _rms(shift), _rms(means.std(0)) * share**0.5, _rms(stretch), _rms(logs.std(0)) * share**0.5
    )


def between(one: list[Moments], other: list[Moments], eps: float) -> Distance:
    """The distance of some batches' moments from others', each pooled.

    The sampling error is that of two averages, √(s₁²/k₁ + s₂²/k₂): of the means from the spread
    between the batches of each kind, of the standard deviations by leaving one batch out at a time
    (the jackknife, Efron & Stein 1981), which notices where a single batch makes them.
    """
    first, second = Moments.merge(one), Moments.merge(other)
    sigma = (torch.maximum(first.var(), second.var()) + eps).sqrt()
    heard = torch.minimum(first.var(), second.var()) > eps / 10
    shift = (first.mean - second.mean) / sigma
    stretch = ((first.var() + eps).log() - (second.var() + eps).log())[heard] / 2
    shift_error, stretch_error = [], []
    for batches in (one, other):
        root = len(batches) ** 0.5
        means = torch.stack([b.mean for b in batches]) / sigma
        rests = [Moments.merge(batches[:i] + batches[i + 1 :]) for i in range(len(batches))]
        logs = torch.stack([(rest.var() + eps).log()[heard] / 2 for rest in rests])
        shift_error.append(_rms(means.std(0)) / root)
        stretch_error.append(_rms(logs.std(0)) * (len(batches) - 1) / root)
    return Distance(
        _rms(shift), math.hypot(*shift_error), _rms(stretch), math.hypot(*stretch_error)
    )


def apart(
    one: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    other: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    eps: float,
) -> tuple[float, float]:
    """How far two running means and variances are apart, as `shift` and `stretch`; no sampling."""
    (mean, var), (other_mean, other_var) = ([t.double() for t in pair] for pair in (one, other))
    sigma = (torch.maximum(var, other_var) + eps).sqrt()
    stretch = ((var + eps).log() - (other_var + eps).log()) / 2
    return _rms((mean - other_mean) / sigma), _rms(stretch)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0

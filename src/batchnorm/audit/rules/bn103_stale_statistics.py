"""BN103: running statistics far from those of the batches seen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.audit.call import Call, TorchBatchNorm
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule
from batchnorm.moments import Moments

__all__ = ["StaleStatistics", "distance"]

EVERY = 4  # training passes between two batches that are looked at
KEPT = 8  # batches kept: with EVERY, the last 32 passes, about what a momentum of 0.1 remembers
FEWEST = 4  # batches below which the spread between them is not known
LARGEST_SHIFT = 0.5  # of a standard deviation
LARGEST_STRETCH = 1.5  # of the standard deviation, either way


class Distance(NamedTuple):
    """How far running statistics are from the batches', root mean square over channels.

    `shift` is in standard deviations of the batches; `stretch` is the ratio of the standard
    deviations, as its logarithm. Each has the standard error that sampling gives it.
    """

    shift: float
    shift_error: float
    stretch: float
    stretch_error: float

    @property
    def is_harmful(self) -> bool:
        """Whether one of them is large, and is still with twice its error taken off."""
        return (
            self.shift - 2 * self.shift_error > LARGEST_SHIFT
            or self.stretch - 2 * self.stretch_error > math.log(LARGEST_STRETCH)
        )


def distance(
    mean: Tensor, var: Tensor, batches: list[Moments], momentum: float | None, eps: float
) -> Distance:
    """The distance of a running mean and variance, (c,), from the batches pooled.

    The sampling error comes from the spread between the batches: of their average, s/√k, and of
    a running average with momentum m, s·√(m/(2 − m)), which together are what two honest
    estimates of the same number differ by.
    """
    k = len(batches)
    pooled = Moments.merge(batches)
    sigma = (pooled.var() + eps).sqrt()
    shift = (mean - pooled.mean) / sigma
    stretch = ((var + eps).log() - (pooled.var() + eps).log()) / 2
    means = torch.stack([b.mean for b in batches]) / sigma
    logs = torch.stack([(b.var() + eps).log() / 2 for b in batches])
    m = momentum or 0.0
    share = 1 / k + m / (2 - m)
    # averaging is over channels only: those of one layer are not independent
    errors = ((spread.var(0).mean() * share).sqrt() for spread in (means, logs))
    shift_error, stretch_error = (float(error) for error in errors)
    return Distance(_rms(shift), shift_error, _rms(stretch), stretch_error)


class StaleStatistics(Rule):
    """## What it finds

    Layers whose running mean or variance is far from the mean and variance of the training
    batches just before the model was last evaluated (or before the run ended). The distance is
    given with its sampling error, and only what exceeds twice that error is reported.

    ## Why it hurts

    In training a layer normalizes with the batch, at inference with the running statistics.
    Where these differ by half a standard deviation and more, the network that is evaluated is
    not the one that was trained, and its accuracy says nothing about the weights.

    ## Example

        BatchNorm2d(64, momentum=0.001)
        # after 500 steps 0.999⁵⁰⁰ = 61 % of the running variance is still the 1 it began with

    A momentum in another framework's sense (0.99 for 0.01 or the reverse), a run of few steps,
    a learning rate at which weights outrun the average, and weights that were averaged or loaded
    without their statistics all end here.

    ## Fix

    Estimate the statistics again with the final weights,
    `torch.optim.swa_utils.update_bn(loader, model)`; for the next run, a larger momentum, or
    `momentum=None` for the plain average.

    ## When it is fine

    Early in training, while the statistics still catch up: only the state at the last evaluation
    is reported. Layers that are frozen train with what they evaluate with, and are left out.

    ## Evidence

    pytorch/pytorch#4741, keras-team/keras#7265, keras-team/keras#10666
    """

    code = "BN103"
    name = "running statistics far from the data's"
    looks_at = "a training run"

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def before(self, call: Call) -> None:
        """In training, note the statistics before every few passes; in eval, what is used."""
        watched = self._watched.get(id(call.layer))
        if watched is None:
            watched = self._watched[id(call.layer)] = _Watched(call.layer, call.path)
        if call.tracks and call.has_gradients:
            watched.before_training(call)
        elif not call.layer.training:
            watched.before_eval()

    def after(self, call: Call) -> None:
        """Read the batch's statistics off what the pass added to the running ones."""
        self._watched[id(call.layer)].after_training(call)

    def findings(self) -> Iterator[Finding]:
        """One for each layer that was far off when it was last evaluated."""
        for watched in self._watched.values():
            d = watched.distance()
            if d is None or not d.is_harmful:
                continue
            yield Finding(
                self.code,
                Severity.WARNING,
                f"the running mean is off by {d.shift:.2g} ± {d.shift_error:.1g} standard "
                f"deviations, the running standard deviation by ×{math.exp(d.stretch):.2g} "
                f"(± {math.expm1(d.stretch_error):.0%})",
                modules=(watched.path,),
                fix="torch.optim.swa_utils.update_bn(loader, model) before evaluating; then a "
                "larger momentum",
                numbers=d._asdict(),
            )


@dataclass
class _Watched:
    """One layer: its last batches, and its running statistics when they were last used."""

    layer: TorchBatchNorm
    path: str
    passes: int = 0
    pending: tuple[Tensor, Tensor] | None = None
    batches: deque[Moments] = field(default_factory=lambda: deque(maxlen=KEPT))
    used: tuple[Tensor, Tensor, list[Moments]] | None = None

    def before_training(self, call: Call) -> None:
        self.used = None
        self.passes += 1
        if self.passes % EVERY == 0 and call.input is not None:
            self.pending = self._running()

    def after_training(self, call: Call) -> None:
        if self.pending is not None and call.input is not None:
            self.batches.append(self._batch(*self.pending, call.input.detach()))
            self.pending = None

    def before_eval(self) -> None:
        if self.used is None and len(self.batches) >= FEWEST:
            self.used = (*self._running(), list(self.batches))

    def distance(self) -> Distance | None:
        """At the last evaluation, or now if training went on after it."""
        self.before_eval()
        if self.used is None:
            return None
        mean, var, batches = self.used
        wide = [Moments(b.count.cpu(), b.mean.double().cpu(), b.m2.double().cpu()) for b in batches]
        return distance(
            mean.double().cpu(), var.double().cpu(), wide, self.layer.momentum, self.layer.eps
        )

    def _running(self) -> tuple[Tensor, Tensor]:
        mean, var = self.layer.running_mean, self.layer.running_var
        assert mean is not None
        assert var is not None
        return mean.clone(), var.clone()

    def _batch(self, mean: Tensor, var: Tensor, x: Tensor) -> Moments:
        """The batch's moments, without a look at x unless there is no other way.

        new = (1 − m)·old + m·batch, so batch = old + (new − old)/m: exact for masks, ghost slices
        and several ranks too, and it costs c operations where x has n·c·positions.
        """
        m: float | Tensor | None = self.layer.momentum
        if m is None and self.layer.num_batches_tracked is not None:
            m = 1 / self.layer.num_batches_tracked
        if m is None or self.layer.momentum == 0:
            return Moments.of(x, (0, *range(2, x.ndim)))
        after_mean, after_var = self._running()
        n = torch.full_like(mean, x.numel() // x.shape[1], dtype=torch.int64)
        batch_var = (var + (after_var - var) / m).clamp(min=0)
        return Moments(n, mean + (after_mean - mean) / m, batch_var * (n - 1))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())

"""BN103: running statistics far from those of the batches seen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.audit.call import Call, TorchBatchNorm
from batchnorm.audit.distance import Distance, distance
from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.place import is_inside_autograd_function
from batchnorm.audit.rule import Rule
from batchnorm.moments import Moments

__all__ = ["StaleStatistics"]

EVERY = 5  # one training pass in so many is looked at; odd, where kinds of batches take turns
KEPT = 8  # batches kept: with EVERY, of the last 40 passes, what a momentum of 0.1 remembers
FEWEST = 4  # batches below which the spread between them is not known


class StaleStatistics(Rule):
    """## What it finds

    Layers whose running mean or variance is far from the mean and variance of the training
    batches just before the model was last evaluated (or before the run ended). The distance is
    given with its sampling error, and only what exceeds twice that error is reported. `audit` with
    batches, and `batchnorm check --data`, compare the statistics of the model as it is.

    ## Why it hurts

    In training a layer normalizes with the batch, at inference with the running statistics.
    Where these differ by half a standard deviation and more, the network that is evaluated is
    not the one that was trained, and its accuracy says nothing about the weights.

    ## Example

        BatchNorm2d(64, momentum=0.001)
        # after 500 steps 0.999⁵⁰⁰ = 61 % of the running variance is still the 1 it began with

    A momentum in another framework's sense (0.99 for 0.01 or the reverse), a run of few steps,
    and a learning rate at which weights outrun the average all end here.

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
    looks_at = "a training run or batches"

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def before(self, call: Call) -> None:
        """In training, note the statistics before every few passes; in eval, what is used."""
        watched = self._watched.get(call.number)
        if watched is None:
            if call.layer.running_mean is None or call.layer.running_mean.is_meta:
                return
            watched = self._watched[call.number] = _Watched(call.path)
        if call.tracks:
            if call.has_gradients or is_inside_autograd_function():
                watched.used = None
                watched.passes += 1
                if watched.passes >= watched.due and call.input is not None:
                    watched.refresh(call)
                    call.notes[self.code] = (watched.version, call.running_statistics())
            watched.calls += 1
        elif not call.layer.training and watched.used is None:
            watched.refresh(call)
            watched.note_use()

    def after(self, call: Call) -> None:
        """Read the batch's statistics off what the pass added to the running ones."""
        note = call.notes.get(self.code)
        if note is None:
            return
        version, old = note
        # a checkpoint's recomputation moves nothing: look at the next pass instead
        if version is None or version != call.batches_version():
            watched = self._watched[call.number]
            watched.batches.append(_batch(call, old))
            watched.due = watched.passes + EVERY

    def findings(self) -> Iterator[Finding]:
        """One for each layer that was far off when it was last evaluated."""
        for watched in self._watched.values():
            yield from self._judged(watched.path, watched.distance())

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer that is far off from what the batches give it."""
        for layer in evidence.layers:
            if layer.running is None or layer.is_frozen or len(layer.batches) < FEWEST:
                continue
            mean, var = layer.running
            norm = layer.layer
            if norm.num_batches_tracked is not None and norm.num_batches_tracked == 0:
                continue  # it has not been trained yet
            if (mean.isfinite() & var.isfinite()).all():  # BN101 says so where they are not
                measured = distance(mean, var, layer.batches, norm.momentum, norm.eps)
                yield from self._judged(layer.path, measured)

    def _judged(self, path: str, d: Distance | None) -> Iterator[Finding]:
        if d is not None and d.is_harmful:
            message = (
                f"the running mean is off by {d.shift:.2g} ± {d.shift_error:.1g} standard "
                f"deviations, the running standard deviation by ×{math.exp(d.stretch):.2g} "
                f"(± {math.expm1(d.stretch_error):.0%})"
            )
            if math.isnan(d.shift):
                message = "the running statistics are not finite, and inference divides by them"
            yield self.found(
                Severity.WARNING,
                message,
                modules=(path,),
                fix="torch.optim.swa_utils.update_bn(loader, model) before evaluating; then a "
                "larger momentum",
                **asdict(d),
            )


@dataclass
class _Watched:
    """One layer: its last batches, and its running statistics when they were last used.

    The buffers are held, the layer is not: they are small, and a model that is gone by the end
    of the run is reported all the same.
    """

    path: str
    momentum: float | None = None
    eps: float = 0.0
    running: tuple[Tensor, Tensor] | None = None
    version: int | None = None
    calls: int = 0  # that may have moved the statistics since `version` was read
    passes: int = 0  # of training
    due: int = EVERY  # the pass to look at
    batches: deque[_Update | _Direct] = field(default_factory=lambda: deque(maxlen=KEPT))
    used: tuple[Tensor, Tensor, list[_Update | _Direct]] | None = None

    def refresh(self, call: Call) -> None:
        """Follow the layer, and forget its batches where somebody else wrote its buffers.

        Statistics that were loaded belong to weights that were loaded with them, and the batches
        do not. Statistics that were only reset belong to the weights that are here.
        """
        mean, var = call.layer.running_mean, call.layer.running_var
        self.running = None if mean is None or var is None else (mean, var)
        self.momentum, self.eps = call.layer.momentum, call.layer.eps
        version = call.batches_version()
        if version is not None and self.version is not None:
            written = version - self.version > self.calls  # a pass writes its counter once
            if written and not _are_initial(call.layer):
                self.batches.clear()
        self.version, self.calls = version, 0

    def note_use(self) -> None:
        """Copy what inference uses, the first time after training."""
        if self.used is None and self.running is not None and len(self.batches) >= FEWEST:
            mean, var = self.running
            self.used = (mean.clone(), var.clone(), list(self.batches))

    def distance(self) -> Distance | None:
        """At the last evaluation, or now if training went on after it."""
        self.note_use()
        if self.used is None:
            return None
        mean, var, batches = self.used
        if not (mean.isfinite() & var.isfinite()).all():
            return Distance(math.nan, 0.0, math.nan, 0.0)  # and so are the updates made to them
        moments = [batch.moments() for batch in batches]
        if not all((m.mean.isfinite() & m.m2.isfinite()).all() for m in moments):
            return None  # the data failed, and the statistics kept out of it
        return distance(mean.double().cpu(), var.double().cpu(), moments, self.momentum, self.eps)


class _Update(NamedTuple):
    """What one training pass did to the running mean and variance.

    new = (1 − m)·old + m·batch, so batch = old + (new − old)/m: exact for masks, ghost slices
    and several ranks too, and without a look at n·c·positions values. It is worked out when
    somebody asks; a pass of training only copies.
    """

    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    momentum: float | Tensor
    values: int  # a channel

    def moments(self) -> Moments:
        """The batch's own moments, in float64 on the CPU."""
        (mean, var), (new_mean, new_var) = (
            [t.double().cpu() for t in pair] for pair in (self.old, self.new)
        )
        m = self.momentum.double().cpu() if isinstance(self.momentum, Tensor) else self.momentum
        n = torch.full_like(mean, self.values, dtype=torch.int64)
        batch_var = (var + (new_var - var) / m).clamp(min=0)
        return Moments(n, mean + (new_mean - mean) / m, batch_var * (n - 1))


class _Direct(NamedTuple):
    """The moments of the input itself, where the running statistics do not tell them."""

    own: Moments

    def moments(self) -> Moments:
        """The batch's moments, in float64 on the CPU."""
        return Moments(
            self.own.count.cpu(), self.own.mean.double().cpu(), self.own.m2.double().cpu()
        )


def _batch(call: Call, old: tuple[Tensor, Tensor]) -> _Update | _Direct:
    layer, x = call.layer, call.input
    assert x is not None, "noted only where there is an input"
    m: float | Tensor | None = layer.momentum
    if m is None and layer.num_batches_tracked is not None:
        m = 1 / layer.num_batches_tracked
    new = call.running_statistics()
    # half precision rounds the step away; a momentum of 0 makes none
    if m is None or layer.momentum == 0 or old[0].dtype.itemsize < 4 or new is None:
        return _Direct(Moments.of(x.detach(), (0, *range(2, x.ndim))))
    return _Update(old, new, m, x.numel() // x.shape[1])


def _are_initial(layer: TorchBatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return mean is None or var is None or bool((mean == 0).all() & (var == 1).all())

"""BN103: running statistics far from those of the batches seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean

from batchnorm.audit.distance import Distance
from batchnorm.audit.evidence import Evidence, LayerEvidence, Losses
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.profiling import running_distance
from batchnorm.audit.rule import Rule, repair

__all__ = ["StaleStatistics"]


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

    Estimate the statistics again with the final weights, `batchnorm.recalibrate(model, loader)`;
    for the next run, a larger momentum, or `momentum=None` for the plain average.

    ## When it is fine

    Early in training, while the statistics still catch up: only the state at the last evaluation
    is reported. Layers that are frozen train with what they evaluate with, and are left out.

    ## Evidence

    pytorch/pytorch#4741, keras-team/keras#7265, keras-team/keras#10666
    """

    code = "BN103"
    name = "running statistics far from the data's"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer that is far off from what the batches give it."""
        for layer in evidence.layers:
            if layer.is_averaged and evidence.is_run:
                continue  # BN105 says so
            d = running_distance(layer)
            if d is None and evidence.is_run and _is_broken(layer):
                d = Distance(math.nan, 0.0, math.nan, 0.0)  # `check` leaves it to BN101
            if d is not None and d.is_harmful:
                yield self._judged(layer.path, d, evidence.losses)

    def _judged(self, path: str, d: Distance, losses: Losses | None) -> Finding:
        message = (
            f"the running mean is off by {d.shift:.2g} ± {d.shift_error:.1g} standard "
            f"deviations, the running standard deviation by ×{d.stretch_factor:.2g} "
            f"(± {math.expm1(d.stretch_error):.0%})"
        )
        numbers = asdict(d)
        if math.isnan(d.shift):
            message = "the running statistics are not finite, and inference divides by them"
        if losses is not None:
            trained, inferred = fmean(losses.training), fmean(losses.inference)
            message += f"; the loss is {trained:.3g} in training mode, {inferred:.3g} in eval mode"
            numbers |= {"training_loss": trained, "inference_loss": inferred}
        return self.found(
            Severity.WARNING,
            message,
            [path],
            repair("recalibrate(model, loader)", "before evaluating; next time, a larger momentum"),
            **numbers,
        )


def _is_broken(layer: LayerEvidence) -> bool:
    return any(not t.isfinite().all() for t in layer.running or ())

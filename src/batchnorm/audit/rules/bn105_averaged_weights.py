"""BN105: averaged weights over the statistics of other weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.profiling import running_distance
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import LayerState, State

__all__ = ["AveragedWeights"]

FIX = repair("recalibrate(averaged_model, loader)", "before it is evaluated or saved")
FIX_FILES = repair("average(model, models, batches=loader)", "or recalibrate(model, loader)")


class AveragedWeights(Rule):
    """## What it finds

    Weights that are an average (EMA, SWA, federated) and running statistics that are not theirs.
    Beside a reference, layers whose γ or β differ from its while the running statistics are the
    same to the last bit. In a training run, layers of an
    `torch.optim.swa_utils.AveragedModel` whose running statistics are far from what those layers
    are given when it is evaluated, with the sampling error.

    ## Why it hurts

    Running statistics describe what a layer was given under the weights that it was trained with.
    The average of weights gives its layers something else, and nobody has ever looked at what. By
    default `AveragedModel` averages parameters and copies the buffers of the latest weights.

    ## Example

        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        ...
        ema.eval()(images)            # with the running statistics of the last step's weights

    ## Fix

    `batchnorm.recalibrate(averaged_model, loader)` after averaging, or
    `batchnorm.average(model, models)`, which merges the statistics as well.

    ## When it is fine

    Statistics that were averaged along are often near enough (facebookresearch/moco#70): only what
    is measured to be far off is a warning. That two files share their statistics is a fact, and
    may be meant where only the last layers were trained.

    ## Evidence

    pytorch/ignite#2590, Lightning-AI/pytorch-lightning#14866
    """

    code = "BN105"
    name = "averaged weights, others' statistics"
    looks_at = "reference, run"

    def compare(self, state: State, reference: State) -> Iterator[Finding]:
        """One finding for all layers that took their statistics from the reference."""
        others = {layer.path: layer for layer in reference.layers}
        paths = [
            layer.path
            for layer in state.layers
            if layer.path in others and _is_borrowed(layer, others[layer.path])
        ]
        if paths:
            yield self.found(
                Severity.INFO,
                f"γ and β differ from {reference.name}, the running statistics are its own to the "
                f"last bit, {in_layers(paths)}",
                paths,
                FIX_FILES,
                layers=float(len(paths)),
            )

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer of averaged weights that is far off."""
        for layer in evidence.layers:
            d = running_distance(layer) if layer.is_averaged and evidence.is_run else None
            if d is not None and d.is_harmful:
                yield self.found(
                    Severity.WARNING,
                    f"under averaged weights the running mean is off by {d.shift:.2g} ± "
                    f"{d.shift_error:.1g} standard deviations, the running standard deviation by "
                    f"×{d.stretch_factor:.2g} (± {math.expm1(d.stretch_error):.0%})",
                    [layer.path],
                    FIX,
                    **asdict(d),
                )


def _is_borrowed(layer: LayerState, other: LayerState) -> bool:
    statistics = [(layer.running_mean, other.running_mean), (layer.running_var, other.running_var)]
    affine = [(layer.weight, other.weight), (layer.bias, other.bias)]
    if layer.is_initial or not all(_are_same(*pair) for pair in statistics):
        return False
    return any(a is not None and b is not None and not _are_same(a, b) for a, b in affine)


def _are_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)

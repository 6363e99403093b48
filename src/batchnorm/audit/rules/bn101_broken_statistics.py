"""BN101: running statistics that no inference can use."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import LayerState, State

__all__ = ["BrokenStatistics"]

LARGEST_EPS = 1e-3  # that frameworks use: where a checkpoint does not tell its own


class BrokenStatistics(Rule):
    """## What it finds

    Running means or variances that are NaN or infinite, and running variances so negative that
    var + ε is not positive.

    ## Why it hurts

    Inference divides by √(var + ε). One NaN or infinity in a batch of training enters the running
    statistics for ever, since every later value is an average with it; training goes on as if
    nothing had happened, for it uses the batch's own statistics, and the first evaluation
    answers NaN.

    ## Example

        scaler.scale(loss).backward()      # a batch overflowed in float16: the step is skipped,
        scaler.step(optimizer)             # the running variance has become infinite all the same

    ## Fix

    Estimate the statistics again from data, `batchnorm.recalibrate(model, loader)`. This library's
    layers skip a batch that is not finite.

    ## When it is fine

    Never for a value that is not finite. A tiny or slightly negative variance is no error where
    ε makes up for it: a published MobileNetV2 has variances near −ε. A checkpoint does not tell
    its ε, so there only a variance below −0.001 is certain, and a smaller negative one is a fact
    to look at.

    ## Evidence

    pytorch/pytorch#88474, pytorch/pytorch#90342, pytorch/pytorch#115500,
    facebookresearch/detectron2#2413
    """

    code = "BN101"
    name = "running statistics that break inference"
    looks_at = "checkpoint, model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for each layer."""
        for layer in state.layers:
            yield from self._examine(layer)

    def _examine(self, layer: LayerState) -> Iterator[Finding]:
        fix = repair("recalibrate(model, loader)")
        held = {"mean": layer.running_mean, "variance": layer.running_var}
        for name, values in held.items():
            broken = 0 if values is None else int((~values.isfinite()).sum())
            if values is not None and broken:
                yield self.found(
                    Severity.ERROR,
                    f"the running {name} is not finite in {broken} of {values.numel()} channels",
                    [layer.path],
                    fix,
                    channels=float(broken),
                )
        var = layer.running_var
        if var is None or not var.numel():
            return
        least = float(var.nan_to_num(0.0).min())
        eps = LARGEST_EPS if layer.eps is None else layer.eps
        if least + eps <= 0:
            whose = "any usual ε" if layer.eps is None else f"ε = {eps:g}"
            yield self.found(
                Severity.ERROR,
                f"the running variance goes down to {least:.3g}, below what {whose} makes up for",
                [layer.path],
                fix,
                variance=least,
            )
        elif least < 0 and layer.eps is None:
            yield self.found(
                Severity.INFO,
                f"the running variance goes down to {least:.3g}; inference works with an ε larger "
                "than that, which the checkpoint does not tell",
                [layer.path],
                f"eps > {-least:.3g} in the layer that loads it",
                variance=least,
            )

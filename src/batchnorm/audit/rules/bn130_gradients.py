"""BN130: gradients that vanish or explode along depth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev

from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule

__all__ = ["Gradients"]

LARGEST = 1e4  # from one end of the network to the other
FEWEST = 3  # backward passes


class Gradients(Rule):
    """## What it finds

    Models in which the loss's gradient by the layers' outputs is 10,000 times as large at one end
    as at the other, in the geometric mean over three backward passes, the first or the last that
    were looked at, beyond twice its error. Needs a training run, or batches with a loss.

    ## Why it hurts

    One learning rate cannot serve both ends: layers with vanishing gradients stand still, those
    with exploding ones jump about. Batch norm keeps activations in range, and gradients only with
    residual connections: without them they grow by a constant factor per layer (Yang et al.
    2019, "A mean field theory of batch normalization", section 3).

    ## Example

        nn.Sequential(*[block for _ in range(100)])         # 100 conv-BN-ReLU, no shortcut

    ## Fix

    Residual connections; learning-rate warm-up and gradient clipping for the first steps; γ = 0 in
    each residual branch's last norm at the beginning (Goyal et al. 2017, section 5.1).

    ## When it is fine

    With optimizers that scale every layer's step by itself (Adam, LARS), a good part of it.

    ## Evidence

    Yang et al. 2019; no case in public has been collected.
    """

    code = "BN130"
    name = "gradients vanish or explode"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each model."""
        models: dict[str, list[LayerEvidence]] = {}
        for layer in evidence.layers:
            model = layer.path.partition(".")[0] if evidence.is_run else ""
            if layer.gradients:
                models.setdefault(model, []).append(layer)
        for layers in models.values():
            yield from self._judged(layers)

    def _judged(self, layers: list[LayerEvidence]) -> Iterator[Finding]:
        first = {g.step: g.norm for g in layers[0].gradients}
        last = {g.step: g.norm for g in layers[-1].gradients}
        both = [step for step in sorted(first) if first[step] > 0 and last.get(step, 0) > 0]
        logs = [math.log(first[step] / last[step]) for step in both]
        logs = [log for log in logs if math.isfinite(log)]
        if len(layers) < 2 or len(logs) < FEWEST:
            return
        # at initialization and in the end: in between weights may pass from one to the other
        for when, some in (("first", logs[:FEWEST]), ("last", logs[-FEWEST:])):
            mean, error = fmean(some), stdev(some) / math.sqrt(len(some))
            if abs(mean) - 2 * error > math.log(LARGEST):
                grows = "explode" if mean > 0 else "vanish"
                yield self.found(
                    Severity.WARNING,
                    f"on the way back from the last to the first of {len(layers)} layers gradients "
                    f"{grows} by ×{math.exp(abs(mean)):.1e} (± {math.expm1(error):.0%}, the "
                    f"{when} {len(some)} passes looked at)",
                    [layers[0].path, layers[-1].path],
                    "residual connections, learning-rate warm-up, gradient clipping",
                    ratio=math.exp(mean),
                    error=error,
                )
                return

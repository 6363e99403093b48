"""BN129: batch norm that shows a sequence model the future."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule, repair

__all__ = ["LeakOverTime"]


class LeakOverTime(Rule):
    """## What it finds

    Models in which an earlier output does not depend on later inputs in eval mode, as in an
    autoregressive model it must not, and does in training mode. Later positions of a batch are
    changed, and the outputs of the earlier ones are compared.

    ## Why it hurts

    Batch norm over time averages over all positions, those to come too. In training the model
    reads from the statistics what it is to predict, and has nothing to read at inference, where
    the running statistics stand in: a loss that is too good in training and a model that
    generates badly.

    ## Example

        nn.Sequential(CausalConv1d(c, c, 3), nn.BatchNorm1d(c))     # normalizes over (n, t)

    ## Fix

    A normalization of each position by itself, over the channels:
    `batchnorm.convert(model, to="layer_norm")`, or `"rms_norm"`. Then train.

    ## When it is fine

    For models that may look at the whole sequence; in those an earlier output depends on later
    inputs in eval mode too, and they are not reported.

    ## Evidence

    A fact that a forward pass shows; no case in public has been collected.
    """

    code = "BN129"
    name = "batch norm shows the future"
    looks_at = "batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, with all layers: which of them leak is not told apart."""
        leak = evidence.leakage
        if leak is not None and leak.is_shown:
            yield self.found(
                Severity.WARNING,
                f"changing later positions changes earlier outputs by {leak.training:.2%} of the "
                f"largest in training mode, by {leak.inference:.0%} in eval mode",
                [layer.path for layer in evidence.layers if not layer.is_frozen],
                repair(
                    'convert(model, to="layer_norm")',
                    "over the channels of each position; then train",
                ),
                training=leak.training,
                inference=leak.inference,
            )

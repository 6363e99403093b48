"""BN131: a layer that is registered and never called."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule

__all__ = ["NeverCalled"]


class NeverCalled(Rule):
    """## What it finds

    Batch norm layers of a model that no batch reaches.

    ## Why it hurts

    Their statistics stay 0 and 1, they are saved, counted and synchronized for nothing, and
    DistributedDataParallel stops at parameters without a gradient. Often the call was forgotten:
    the network trains without the normalization that it was given.

    ## Example

        self.norm = nn.BatchNorm2d(64)      # in __init__
        return F.relu(self.conv(x))         # in forward: the norm is missing

    ## Fix

    Call the layer, or take it out of the model.

    ## When it is fine

    Where a branch belongs to another mode or another kind of input than these batches are:
    auxiliary heads, domains, stochastic depth.

    ## Evidence

    A fact that a forward pass shows; no case in public has been collected.
    """

    code = "BN131"
    name = "layers that are never called"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers."""
        if evidence.uncalled:
            yield self.found(
                Severity.INFO,
                f"never called, {in_layers(evidence.uncalled)}",
                evidence.uncalled,
                "call the layer in forward(), or take it out of the model",
                layers=float(len(evidence.uncalled)),
            )

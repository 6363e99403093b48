"""BN125: padding inside the statistics."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.distance import between
from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.noise import FEWEST
from batchnorm.audit.rule import Rule
from batchnorm.moments import Moments

__all__ = ["Padding"]


class Padding(Rule):
    """## What it finds

    Layers whose batch statistics are far from those of the data alone, because padding is
    averaged in. It needs the mask: `audit(model, batches, mask=lambda batch: batch["mask"])`, true
    where there is data.

    ## Why it hurts

    A batch of sequences is as long as its longest. The zeros behind the others pull each mean
    towards what the layers before make of zeros, and shrink the variance; how much depends on
    which lengths meet in a batch, so that a sequence's result depends on its companions, and at
    inference, alone and unpadded, it is normalized by statistics that it does not have.

    ## Example

        x = pad_sequence(sequences, batch_first=True)       # lengths from 20 to 400
        model(x)                                            # with batch norm over time

    ## Fix

    `BatchNorm1d(c)(x, mask=mask)` of this library averages over the data alone. Or sort by length
    into buckets.

    ## When it is fine

    Where lengths are nearly the same. Only what is measured to be far off is reported.

    ## Evidence

    pytorch/pytorch#70529
    """

    code = "BN125"
    name = "padding inside the statistics"
    looks_at = "batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer at whose resolution the mask can be read."""
        for layer in evidence.layers:
            if len(layer.masked) < FEWEST or len(layer.masked) != len(layer.batches):
                continue
            d = between(layer.masked, layer.batches, layer.eps)
            if d.is_harmful:
                data = Moments.merge(layer.masked).count.max()
                every = Moments.merge(layer.batches).count.max()
                yield self.found(
                    Severity.WARNING,
                    f"{1 - int(data) / int(every):.0%} of the values are padding: with it the mean "
                    f"is off by {d.shift:.2g} ± {d.shift_error:.1g} standard deviations, the "
                    f"standard deviation by ×{d.stretch_factor:.2g}",
                    [layer.path],
                    "batchnorm.BatchNorm1d(c)(x, mask=mask)",
                    shift=d.shift,
                    shift_error=d.shift_error,
                    stretch=d.stretch,
                    stretch_error=d.stretch_error,
                )

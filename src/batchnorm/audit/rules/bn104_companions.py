"""BN104: an output in eval mode that depends on the other samples."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule, repair

__all__ = ["Companions"]

ROUNDING = 1e-3  # of the largest output: batches of another size take kernels that round otherwise


class Companions(Rule):
    """## What it finds

    A model whose outputs, in eval mode, change when other samples of the batch are taken away.

    ## Why it hurts

    Inference is then no function of the input. A service that batches requests answers the same
    request differently each time; test accuracy depends on the order of the test set; one sample
    alone is normalized by itself.

    ## Example

        nn.BatchNorm2d(64, track_running_stats=False)      # eval uses the batch's statistics too

    ## Fix

    Layers with running statistics, estimated again on training data:
    `batchnorm.recalibrate(model, loader)`.

    ## When it is fine

    By design, where the statistics of a set are what is wanted: style transfer and image-to-image
    models normalize each image by itself (NVIDIA/pix2pixHD#175), which batches of one do.

    ## Evidence

    pytorch/pytorch#156051, pytorch/pytorch#46818
    """

    code = "BN104"
    name = "output depends on the other samples"
    looks_at = "batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, with the layers that use the batch's statistics in eval mode."""
        if evidence.companions is None or evidence.companions <= ROUNDING:
            return
        using = [layer.path for layer in evidence.layers if layer.mixes_in_eval]
        if using:  # else it is not batch norm that mixes them
            yield self.found(
                Severity.WARNING,
                f"in eval mode outputs change by {evidence.companions:.0%} of the largest when the "
                "other half of the batch is taken away",
                using,
                "track_running_stats=True, then " + repair("recalibrate(model, loader)"),
                change=evidence.companions,
            )

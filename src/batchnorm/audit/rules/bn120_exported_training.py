"""BN120: an exported graph that still normalizes with the batch."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule
from batchnorm.models.graph import Graph

__all__ = ["ExportedTraining"]


class ExportedTraining(Rule):
    """## What it finds

    Operations of an ONNX file, or of a program of `torch.export`, that normalize with the
    statistics of the batch: batch norms in training mode.

    ## Why it hurts

    The exported network answers each request by the others in its batch, and a single one by
    itself; running statistics are not used, or written by a runtime that nobody asked to train.
    `torch.export` keeps the mode that the model was in.

    ## Example

        program = torch.export.export(model, (x,))          # model.eval() was forgotten

    ## Fix

    `model.eval()`, and export again.

    ## When it is fine

    For a program that is exported to be trained on; `torch.export.export(model.train(), …)` is the
    first step of quantization-aware training too.

    ## Evidence

    microsoft/onnxscript#1338, pytorch/pytorch#75252
    """

    code = "BN120"
    name = "exported in training mode"
    looks_at = "operations"

    def read(self, graph: Graph) -> Iterator[Finding]:
        """One finding for all operations."""
        names = list(dict.fromkeys(node.name for node in graph.nodes if node.uses_batch))
        if names:
            operations = "1 operation" if len(names) == 1 else f"{len(names)} operations"
            yield self.found(
                Severity.ERROR,
                f"{operations} of the exported graph normalize with the batch's statistics",
                names,
                "model.eval() before exporting it again",
                operations=float(len(names)),
            )

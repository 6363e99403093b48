"""BN119: batch norms that a fold into the convolution before them would get wrong."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.models.graph import Graph, Node

__all__ = ["Unfoldable"]


class Unfoldable(Rule):
    """## What it finds

    Batch norms behind a convolution or linear layer into which they cannot be folded as they
    stand: the convolution is called for another layer too, something else takes its output too,
    the layer is in training mode in a model that is in eval mode, or the convolution is transposed
    and has groups.

    ## Why it hurts

    Folding multiplies γ/√(var + ε) into the convolution's weights and takes the norm out. A
    convolution that two norms share gets both factors; a second consumer of its output gets
    what was meant for the norm; a layer that normalizes with the batch has no factor that is a
    constant. Tools that look only at which module stands behind which do it all the same, and the
    network answers otherwise.

    ## Example

        x = self.conv(x)
        return self.norm(x) + x             # the shortcut takes the convolution's output too

    ## Fix

    `batchnorm.fold(model, batch)`, which goes by the order of operations: it gets transposed
    convolutions with groups right, leaves the others and says why, and compares outputs before and
    after.

    ## When it is fine

    As long as nobody folds.

    ## Evidence

    pytorch/pytorch#104593, pytorch/pytorch#197539
    """

    code = "BN119"
    name = "norms that folding would get wrong"
    looks_at = "operations"

    def read(self, graph: Graph) -> Iterator[Finding]:
        """One finding for each reason."""
        reasons: dict[str, dict[str, None]] = {}
        for node, norm in graph.norms():
            source = node.source
            if source is None or not source.is_linear:
                continue
            for reason in _reasons(graph, source, norm.training):
                reasons.setdefault(reason, {})[node.name] = None
        for reason, paths in reasons.items():
            yield self.found(
                Severity.INFO,
                f"folding by pairs gets them wrong, since {reason}, {in_layers(paths)}",
                paths,
                repair("fold(model.eval(), batch)", "which gets them right, or leaves them"),
                layers=float(len(paths)),
            )


def _reasons(graph: Graph, source: Node, norm_trains: bool) -> Iterator[str]:
    module = source.module
    assert module is not None
    calls, fed = graph.calls(module), graph.feeds(module)
    if calls > 1 and (len(fed) > 1 or calls > sum(graph.calls(norm) for norm in fed)):
        yield "the convolution before it is called for something else too"
    elif source.users > 1:
        yield "something else takes the convolution's output too"
    if norm_trains and not module.training:
        yield "it is in training mode behind a convolution in eval mode"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        yield "the convolution before it is transposed and has groups"

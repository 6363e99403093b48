"""BN127: what batch norm cancels, and what unsettles it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.models.graph import Graph, Node

__all__ = ["Wasted"]


class Wasted(Rule):
    """## What it finds

    A bias of a convolution or linear layer that the batch norm behind it takes out again; dropout
    before a batch norm; and, in a training run, weight decay on γ and β.

    ## Why it hurts

    A little, or not at all. The batch's mean takes any constant out, so the bias has a gradient of
    zero and costs memory, time and a place in the optimizer. Dropout changes the variance between
    training and inference, which the running variance, learned in training, does not know (Li et
    al. 2019, "Understanding the disharmony between dropout and batch normalization by variance
    shift"). Decay pulls γ towards 0 and with it the layer's scale; whether that helps or harms is
    unsettled (cszn/KAIR#4).

    ## Example

        nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))      # bias=False

    ## Fix

    `bias=False`, or of trained weights `batchnorm.convert(model, to="drop_bias")`; dropout behind
    the last batch norm; `batchnorm.parameter_groups(model, weight_decay)`, whose γ and β have none.

    ## When it is fine

    Nearly always; these are facts. Published weights have such biases, and removing them changes
    the state dict's keys.

    ## Evidence

    autrainer/autrainer#166
    """

    code = "BN127"
    name = "bias, dropout or decay of no use to it"
    looks_at = "operations, run"

    def read(self, graph: Graph) -> Iterator[Finding]:
        """One finding for all biases, one for all dropouts."""
        biases: dict[str, None] = {}
        dropouts: dict[str, None] = {}
        for node, norm in graph.norms():
            source = node.source
            takes_mean_out = norm.training or norm.running_mean is not None
            if source is None or not takes_mean_out:
                continue
            once = source.users == 1 and graph.calls(source.module or norm) == 1
            if once and _has_bias(source, norm.num_features):
                biases[source.name] = None
            for before in (source, source.source if source.is_linear else None):
                if before is not None and _drops(before):
                    dropouts[before.name] = None
        if biases:
            yield self.found(
                Severity.INFO,
                f"a bias that the batch norm behind it takes out again, {in_layers(biases)}",
                biases,
                repair('convert(model, to="drop_bias", example=batch)', "or bias=False"),
                layers=float(len(biases)),
            )
        if dropouts:
            yield self.found(
                Severity.INFO,
                "dropout before a batch norm, whose running variance does not know that it ends, "
                f"{in_layers(dropouts)}",
                dropouts,
                "dropout behind the last batch norm",
                layers=float(len(dropouts)),
            )

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers whose γ or β decays."""
        decayed = {layer.path: layer.decay for layer in evidence.layers if layer.decay > 0}
        if decayed:
            yield self.found(
                Severity.INFO,
                f"weight decay of {max(decayed.values()):g} on γ and β {in_layers(decayed)}",
                decayed,
                repair("parameter_groups(model, optimizer=optimizer)"),
                decay=max(decayed.values()),
            )


def _has_bias(node: Node, channels: int) -> bool:
    """Whether there is a bias for each of the norm's channels, not along another axis."""
    bias = getattr(node.module, "bias", None) if node.is_linear else None
    return isinstance(bias, Tensor) and bias.numel() == channels


def _drops(node: Node) -> bool:
    return isinstance(node.module, nn.modules.dropout._DropoutNd) and node.module.p > 0

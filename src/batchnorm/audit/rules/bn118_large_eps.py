"""BN118: an ε that was not meant."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule
from batchnorm.audit.state import State

__all__ = ["LargeEps"]

LARGE = 0.1


class LargeEps(Rule):
    """## What it finds

    Layers whose ε is 0.1 or more.

    ## Why it hurts

    ε keeps the division from failing where the variance is 0; usual values are 1e-5 to 1e-3. An ε
    of 0.1 and more shrinks every channel whose variance is not far above it. It is nearly always
    a momentum that was passed by position: the second argument of a layer is ε.

    ## Example

        nn.BatchNorm2d(64, 0.1)            # meant: momentum=0.1
        nn.BatchNorm2d(64, 0.99)           # meant: momentum, and in Keras's sense

    ## Fix

    `BatchNorm2d(64, momentum=0.1)`, by name.

    ## When it is fine

    For weights that were trained with it: then it must stay.

    ## Evidence

    gzuidhof/nn-transfer#3, pytorch/vision#2169
    """

    code = "BN118"
    name = "an ε so large that momentum was meant"
    looks_at = "a model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for each value."""
        found: dict[float, list[str]] = {}
        for layer in state.layers:
            if layer.eps is not None and layer.eps >= LARGE:
                found.setdefault(layer.eps, []).append(layer.path)
        for eps, paths in found.items():
            yield self.found(
                Severity.WARNING,
                f"ε = {eps:g}, which looks like a momentum passed by position, {in_layers(paths)}",
                paths,
                f"BatchNorm2d(channels, momentum={eps:g}), by name",
                eps=eps,
            )

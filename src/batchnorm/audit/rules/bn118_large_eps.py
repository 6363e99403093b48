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

    Layers whose ε is 0.1 or more, and, beside a reference that tells its own (a model, an ONNX
    file), layers whose ε is another.

    ## Why it hurts

    ε keeps the division from failing where the variance is 0; usual values are 1e-5 to 1e-3. An ε
    of 0.1 and more shrinks every channel whose variance is not far above it. It is nearly always
    a momentum that was passed by position: the second argument of a layer is ε. Weights that
    were trained with another ε (Keras has 1e-3) are scaled by √((var + ε)/(var + ε')), layer upon
    layer.

    ## Example

        nn.BatchNorm2d(64, 0.1)            # meant: momentum=0.1
        nn.BatchNorm2d(64, 0.99)           # meant: momentum, and in Keras's sense

    ## Fix

    `BatchNorm2d(64, momentum=0.1)`, by name.

    ## When it is fine

    For weights that were trained with it: then it must stay, and a reference says so.

    ## Evidence

    gzuidhof/nn-transfer#3, pytorch/vision#2169
    """

    code = "BN118"
    name = "an ε that was not meant"
    looks_at = "model, reference"

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

    def compare(self, state: State, reference: State) -> Iterator[Finding]:
        """One finding for each pair of values."""
        others = {layer.path: layer.eps for layer in reference.layers}
        found: dict[tuple[float, float], list[str]] = {}
        for layer in state.layers:
            eps, other = layer.eps, others.get(layer.path)
            # a file holds it in single precision
            if eps is not None and other is not None and abs(eps - other) > 1e-6 * max(eps, other):
                found.setdefault((eps, other), []).append(layer.path)
        for (eps, other), paths in found.items():
            yield self.found(
                Severity.WARNING,
                f"ε = {eps:g} where {reference.name} has {other:g}, {in_layers(paths)}",
                paths,
                f"eps={other:g}",
                eps=eps,
                reference=other,
            )

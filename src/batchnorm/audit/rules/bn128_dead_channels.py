"""BN128: channels that carry nothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.profiling import dead_channels
from batchnorm.audit.rule import Rule
from batchnorm.audit.state import State

__all__ = ["DeadChannels"]

ZERO = 1e-5  # of |γ|: what is left of an input is below float32's rounding of a β of 100


class DeadChannels(Rule):
    """## What it finds

    Channels whose |γ| is below 1e-5 in layers where others' is not: their output is β, whatever
    the input. With batches or in a run, channels too whose output these hardly move,
    |γ|·√(var / (var + ε)) < 0.001: what feeds them is constant.

    ## Why it hurts

    It may not. Weight decay on γ drives channels that the loss does not need to 0; they cost
    memory and time and carry nothing. Many of them say that the layer is wider than it has to be,
    or that decay on γ is too strong.

    ## Example

        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)      # γ decays too

    ## Fix

    Prune the channels, or train without weight decay on γ and β (parameter groups).

    ## When it is fine

    Where channels were pruned on purpose by their γ (network slimming). A layer whose γ is 0 in
    every channel has just been initialized so, as residual branches are, and is not reported.

    ## Evidence

    Liu et al. 2017, "Learning efficient convolutional networks through network slimming"
    """

    code = "BN128"
    name = "channels that carry nothing"
    looks_at = "checkpoint, run, batches"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for all layers."""
        dead: dict[str, Tensor] = {}
        for layer in state.layers:
            if layer.weight is not None:
                dead[layer.path] = layer.weight.abs() < ZERO
        yield from self._told(
            dead,
            f"have |γ| < {ZERO:g}: they output β, whatever comes in",
            "prune them, or train without weight decay on γ",
        )

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers with channels that these batches do not move."""
        dead: dict[str, Tensor] = {}
        for layer in evidence.layers:
            silent = dead_channels(layer)
            if silent is None:
                continue
            if layer.weight is not None and not evidence.is_run:
                silent &= layer.weight.abs() >= ZERO  # `examine` has told of the others
            dead[layer.path] = silent
        yield from self._told(
            dead,
            "hardly move on these batches: their variance or γ is next to 0",
            "prune them, or initialize what feeds them again",
        )

    def _told(self, dead: dict[str, Tensor], what: str, fix: str) -> Iterator[Finding]:
        """One finding for the layers of which some channels are dead, and not all."""
        counts = {path: int(each.sum()) for path, each in dead.items()}
        some = {path: n for path, n in counts.items() if 0 < n < dead[path].numel()}
        if some:
            total = sum(some.values())
            channels = sum(dead[path].numel() for path in some)
            yield self.found(
                Severity.INFO,
                f"{total} of {channels} channels {in_layers(some)} {what}",
                sorted(some, key=lambda path: -some[path]),
                fix,
                channels=float(total),
            )

"""BN117: a momentum that does not average."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule
from batchnorm.audit.state import State

__all__ = ["NoMomentum"]

SWAPPED = 0.9  # of the new batch: what other frameworks call so is the share that is kept


class NoMomentum(Rule):
    """## What it finds

    Layers with `momentum=0.0`, which never take a batch up into their running statistics. Asked
    for by its code (`--select BN117`), it also guesses where a momentum of 0.9 and more was meant
    as Keras has it.

    ## Why it hurts

    In PyTorch momentum is the share of the new batch: 0.1 moves a tenth of the way. 0 moves
    nothing: a layer that starts at 0 and 1 evaluates with 0 and 1 after any training. Other
    frameworks mean the share that is kept (Keras 0.99 is PyTorch's 0.01), and conversions have
    left 0 behind. It is not None either, which is the plain average of all batches.

    ## Example

        nn.BatchNorm2d(64, momentum=0.0)      # meant: keep nothing of the old

    ## Fix

    1 − m for a momentum m of Keras, TensorFlow or Flax, which `batchnorm.port(weights, "keras")`
    tells and sets; None for the average of all batches.

    ## When it is fine

    On purpose, to hold trained statistics still. Published weights, ported from other frameworks,
    have it under trained statistics; that is a fact and no warning.

    ## Evidence

    Cadene/pretrained-models.pytorch#5, Cadene/pretrained-models.pytorch#44
    """

    code = "BN117"
    name = "a momentum that does not average"
    looks_at = "model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for the layers with trained statistics, one for those without; guesses."""
        yield from self._guess(state)
        found: dict[bool, list[str]] = {}
        for layer in state.layers:
            module = layer.module
            tracks = module is not None and module.track_running_stats
            if module is not None and tracks and module.momentum == 0:
                found.setdefault(layer.is_initial, []).append(layer.path)
        for never_learned, paths in found.items():
            what = (
                "statistics of 0 and 1, which no training will move,"
                if never_learned
                else "trained statistics, which further training will not move,"
            )
            yield self.found(
                Severity.WARNING if never_learned else Severity.INFO,
                f"momentum 0 over {what} {in_layers(paths)}",
                paths,
                "layer.momentum = 0.1, or None for the average of all batches",
                layers=float(len(paths)),
            )

    def _guess(self, state: State) -> Iterator[Finding]:
        found: dict[float, list[str]] = {}
        for layer in state.layers:
            momentum = None if layer.module is None else layer.module.momentum
            if momentum is not None and momentum >= SWAPPED:
                found.setdefault(momentum, []).append(layer.path)
        for momentum, paths in found.items():
            yield self.found(
                Severity.INFO,
                f"momentum {momentum:g}: the running statistics are nearly the last batch's, "
                f"{in_layers(paths)}",
                paths,
                f"momentum={1 - momentum:.3g}, if it was meant as the share that is kept, as "
                "batchnorm.port takes it from other frameworks",
                is_guess=True,
                momentum=momentum,
            )

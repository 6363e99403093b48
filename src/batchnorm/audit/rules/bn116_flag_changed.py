"""BN116: track_running_stats changed after the layer was made."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule
from batchnorm.audit.state import State

__all__ = ["FlagChanged"]


class FlagChanged(Rule):
    """## What it finds

    Layers whose `track_running_stats` contradicts their buffers: the flag says no and there are
    running statistics, or it says yes and there are none.

    ## Why it hurts

    The constructor reads the flag to make the buffers; afterwards it alone decides nothing.
    Setting it to False leaves buffers that inference still normalizes with, and that no training
    moves any more, though the layer prints `track_running_stats=False` and people expect the
    batch's statistics. Setting it to True where there are no buffers changes nothing at all.

    ## Example

        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.track_running_stats = False      # eval() still uses the old running statistics

    ## Fix

    Set `running_mean`, `running_var` and `num_batches_tracked` to None beside the flag, or make
    the layer anew with `track_running_stats=False`. To stop statistics from moving, freeze the
    layer.

    ## When it is fine

    As a way to freeze statistics in training under torch.nn: they stay, and inference uses them.

    ## Evidence

    pytorch/pytorch#20967, pytorch/pytorch#37823
    """

    code = "BN116"
    name = "track_running_stats changed afterwards"
    looks_at = "model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for each of the two contradictions."""
        contradictions: dict[bool, list[str]] = {}
        for layer in state.layers:
            if layer.module is None:
                continue
            # as it was set: a frozen layer's reads as False
            flag = bool(vars(layer.module)["track_running_stats"])
            if flag != (layer.module.running_mean is not None):
                contradictions.setdefault(flag, []).append(layer.path)
        for flag, paths in contradictions.items():
            what = (
                "True without running statistics, so that inference uses the batch's,"
                if flag
                else "False over running statistics, which inference still uses,"
            )
            yield self.found(
                Severity.WARNING,
                f"track_running_stats={what} {in_layers(paths)}",
                paths,
                "make the layer anew with the flag; to stop statistics from moving, freeze(model)",
                layers=float(len(paths)),
            )

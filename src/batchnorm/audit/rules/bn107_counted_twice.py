"""BN107: activation checkpointing that counts every batch twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair

__all__ = ["CountedTwice"]


class CountedTwice(Rule):
    """## What it finds

    Layers whose running statistics move while the backward pass runs: an activation checkpoint
    computes its part of the network again, and the layer takes the same batch up once more.

    ## Why it hurts

    Each batch enters the running statistics twice, so that a momentum of 0.1 works as 0.19: the
    average remembers half as many batches and is noisier. `num_batches_tracked` is twice the number
    of batches, and with `momentum=None` the plain average is still right by luck, as every batch
    counts twice.

    ## Example

        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)   # block has a norm

    ## Fix

    This library's layers know a recomputation and leave the statistics alone:
    `batchnorm.convert(model, to="batchnorm")`. For torch.nn's, half the momentum: 1 − √(1 − m).

    ## When it is fine

    Where the momentum was chosen with checkpointing on.

    ## Evidence

    pytorch/pytorch#96136
    """

    code = "BN107"
    name = "batches counted twice by checkpointing"
    looks_at = "run"

    def __init__(self) -> None:
        self._counts: dict[int, tuple[str, int]] = {}

    def before(self, call: Call) -> None:
        """In a backward pass, note how often the statistics were written."""
        if call.tracks and torch._C._current_graph_task_id() != -1:
            call.notes[self.code] = call.batches_version()

    def after(self, call: Call) -> None:
        """Count what was written once more."""
        version = call.notes.get(self.code)
        if version is not None and call.batches_version() != version:
            _, count = self._counts.get(call.number, ("", 0))
            self._counts[call.number] = call.path, count + 1

    def broken_off(self, call: Call) -> None:
        """A recomputation ends within the last layer of which it needs something."""
        self.after(call)

    def findings(self) -> Iterator[Finding]:
        """One for all layers."""
        if self._counts:
            paths = [path for path, _ in self._counts.values()]
            passes = max(count for _, count in self._counts.values())
            yield self.found(
                Severity.WARNING,
                f"running statistics moved again while {passes} backward passes recomputed them, "
                f"{in_layers(paths)}",
                paths,
                repair('convert(model, to="batchnorm")', "or a momentum of 1 − √(1 − m)"),
                layers=float(len(paths)),
                passes=float(passes),
            )

"""BN108: running statistics that move while gradients are off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.place import calling_place, is_inside, is_inside_autograd_function
from batchnorm.audit.rule import Rule

__all__ = ["MovedWithoutGradients"]

# Forward passes without gradients that are there to move the statistics.
_MEANT = frozenset(
    {
        ("torch/optim/swa_utils.py", "update_bn"),
        ("fvcore/nn/precise_bn.py", "update_bn_stats"),
    }
)


class MovedWithoutGradients(Rule):
    """## What it finds

    Forward passes in training mode under `torch.no_grad()` or `torch.inference_mode()` that
    moved the running statistics, and the line in your code that made them.

    ## Why it hurts

    Without gradients nothing is being trained, so this is validation without `model.eval()`, a
    teacher or a target network left in training mode, or a dummy pass to find a shape. It does
    two things: the statistics move towards data that the weights are not trained on (test data
    leaks into the model), and the outputs are those of the batch, so that a sample's result
    depends on its companions and the measured accuracy is not that of the deployed model.

    ## Example

        @torch.no_grad()
        def validate(model, loader):
            for x, y in loader:
                model(x)            # still in training mode: every batch moves the statistics

    ## Fix

    `model.eval()` before, `model.train()` after. For a network that must never learn statistics,
    `batchnorm.freeze(model)`, which survives `model.train()`. For passes that have to be in
    training mode, a teacher's or a dummy's, `with batchnorm.frozen_statistics(model):`.

    ## When it is fine

    When the pass is there to estimate the statistics again. `torch.optim.swa_utils.update_bn` and
    fvcore's `update_bn_stats` are known and not reported, nor are plain averages (`momentum=None`)
    of a trained layer that begin at a reset. Passes inside an `autograd.Function`, such as a
    reentrant activation checkpoint's, train.

    ## Evidence

    facebookresearch/unbiased-teacher#47, qualcomm/aimet#1279
    """

    code = "BN108"
    name = "statistics moved with gradients off"
    looks_at = "run"

    def __init__(self) -> None:
        self._calls: dict[str | None, Counter[tuple[int, str]]] = {}
        self._in_a_row: Counter[int] = Counter()  # passes since the last one with gradients

    def before(self, call: Call) -> None:
        """Copy the statistics; by value, since not every kernel raises the tensor's version."""
        if not call.tracks:
            return
        if call.has_gradients:
            self._in_a_row[call.number] = 0
        else:
            if call.number in self._in_a_row:
                self._in_a_row[call.number] += 1
            call.notes[self.code] = call.running_statistics()

    def after(self, call: Call) -> None:
        """Compare them."""
        before = call.notes.get(self.code)
        if before is None:
            return
        now = call.running_statistics()
        if now is None or all(map(torch.equal, before, now)):
            return
        if self._estimates(call):
            return
        if not is_inside(_MEANT) and not is_inside_autograd_function():
            self._calls.setdefault(calling_place(), Counter())[call.number, call.path] += 1

    def _estimates(self, call: Call) -> bool:
        """Whether a trained layer averages from a reset on, as nobody does who forgets eval()."""
        batches = call.layer.num_batches_tracked
        if call.layer.momentum is not None or batches is None:
            return False
        return call.number in self._in_a_row and int(batches) <= self._in_a_row[call.number]

    def findings(self) -> Iterator[Finding]:
        """One for each place in the user's code."""
        for place, counts in self._calls.items():
            passes = max(counts.values())
            layers = "layer moved its" if len(counts) == 1 else "layers moved their"
            times = "pass" if passes == 1 else "passes"
            yield self.found(
                Severity.WARNING,
                f"{len(counts)} {layers} running statistics in {passes} forward "
                f"{times} with gradients off: the model was in training mode",
                modules=tuple(path for _, path in counts),
                place=place,
                fix="model.eval()  # before this line, and model.train() before training goes on; "
                "or within batchnorm.frozen_statistics(model)",
                layers=float(len(counts)),
                passes=float(passes),
            )

"""BN122: gradient accumulation, of which batch norm knows nothing."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule, repair

__all__ = ["Accumulated"]

FEWEST = 3  # optimizer steps


class Accumulated(Rule):
    """## What it finds

    Optimizer steps that add up the gradients of several forward and backward passes, while each
    pass normalizes with its own micro-batch and moves the running statistics.

    ## Why it hurts

    It may not. The gradient is one of the large batch; the statistics are those of a small one,
    with its noise (BN110 measures that), and the running statistics move once a micro-batch, so
    that k of them forget k times as fast as one large batch would. "The same as a batch k times as
    large" holds for every layer but batch norm.

    ## Example

        for i, (x, y) in enumerate(loader):            # batches of 8
            (criterion(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimizer.step(); optimizer.zero_grad()         # of 32, says the paper

    ## Fix

    `batchnorm.accumulate(model, k)`: the running statistics take up k micro-batches as one batch.
    For normalization too, `batchnorm.pooled_forward(model, batches)`, or larger batches where
    memory allows (`rematerialize(model)`).

    ## When it is fine

    Where micro-batches are large enough for their own statistics, some 16 samples and more.

    ## Evidence

    pytorch/pytorch#46516, Lightning-AI/pytorch-lightning#17446
    """

    code = "BN122"
    name = "gradients accumulated, statistics not"
    looks_at = "run"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each model, from its first layer."""
        for layer in evidence.layers:
            steps = sum(layer.updates.values())
            if steps < FEWEST:
                continue
            backwards, times = layer.updates.most_common(1)[0]
            if backwards >= 2 and times > steps / 2:
                yield self.found(
                    Severity.INFO,
                    f"{times} of {steps} optimizer steps added up the gradients of {backwards} "
                    "backward passes, each normalized by its own batch",
                    [layer.path],
                    repair(f"accumulate(model, {backwards})", "before training"),
                    passes=float(backwards),
                    steps=float(steps),
                )

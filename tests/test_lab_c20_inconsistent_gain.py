"""Claim 20: its quick run, the tasks' measures, and how errors become gains."""

import pytest
import torch

from batchnorm.lab.claims.c20_inconsistent_gain import (
    TASKS,
    InconsistentGain,
    classified,
    gain,
    predicted,
    squared,
)
from batchnorm.lab.language import KNOWS_NOTHING
from batchnorm.lab.results import Results
from batchnorm.lab.training import Run
from laboratory import quick


def test_the_quick_run_learns_every_task():
    results = quick(InconsistentGain)
    knows_nothing = {"digits": 85, "tumours": 30, "diabetes": 0.9, "text": 0.8 * KNOWS_NOTHING}
    for row in results.where(arm="batch"):
        assert 0 < row["test"] < knows_nothing.get(row["task"], 89)
    assert len(InconsistentGain.hypotheses) == len(TASKS)
    for hypothesis in InconsistentGain.hypotheses:
        assert len(hypothesis.effect(results)) == 1
    InconsistentGain().figure(results)


def test_errors_are_finite_and_never_zero():
    fine, diverged = Run([1.0]), Run([float("nan")], diverged=True)
    logits, labels = torch.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])
    assert classified(fine, logits, labels) == pytest.approx(100 * 1.5 / 5)
    assert classified(fine, logits[:3], labels[:3]) == pytest.approx(100 * 0.5 / 4)
    assert classified(diverged, logits, labels) == pytest.approx(100 * 3.5 / 5)
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 2.0])
    assert float(squared(outputs, targets)) == 0.5
    assert predicted(fine, outputs, targets) == 0.5
    assert predicted(fine, 100 * outputs, targets) == 4
    assert predicted(diverged, outputs * float("nan"), targets) == 4


def test_the_gain_is_of_each_arm_at_its_best_rate():
    def row(arm, rate, seed, validation, test):
        measured = {"validation": validation, "test": test}
        return {"task": "text", "arm": arm, "rate": rate, "seed": seed, **measured}

    results = Results(
        [
            *(row("none", 0.1, seed, 1.0, test) for seed, test in enumerate((3.0, 4.0))),
            *(row("none", 1.0, seed, 2.0, 0.5) for seed in range(2)),
            *(row("batch", 0.1, seed, 5.0, 9.0) for seed in range(2)),
            *(row("batch", 1.0, seed, 4.0, 2.0) for seed in range(2)),
        ]
    )
    assert gain(results, "text") == [1.5, 2.0]

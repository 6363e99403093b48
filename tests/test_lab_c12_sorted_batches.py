"""Claim 12: its quick run, how batches are sorted, and how errors become effects."""

from itertools import islice

import pytest
import torch

from batchnorm.lab.claims.c12_sorted_batches import SortedBatches, above, lost, sorted_batches
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns():
    results = quick(SortedBatches)
    assert len(results) == 7
    for row in results:
        for measure in ("validation", "test", "by_batch", "recalibrated"):
            assert 0 <= row[measure] <= 100
    for arm in ("batch", "group"):
        (error,) = results.where(arm=arm, order="shuffled").values("test")
        assert error < 30, f"{arm} norm does not learn from shuffled batches"
    for row in results.where(arm="group"):
        assert row["recalibrated"] == row["test"], "group norm has nothing to recalibrate"
    for row in results.where(arm="frozen"):
        assert row["recalibrated"] == row["test"]
    SortedBatches().figure(results)
    for hypothesis in SortedBatches.hypotheses:
        assert len(hypothesis.effect(results)) == 1


def test_a_sorted_batch_has_as_many_of_each_of_its_classes():
    labels = torch.arange(10).repeat(40)
    seen = set()
    for chosen in islice(sorted_batches(labels, 32, 2, seed=0), 50):
        classes, counts = labels[chosen].unique(return_counts=True)
        assert counts.tolist() == [16, 16]
        assert len(chosen.unique()) == 32
        assert len(labels[chosen][:16].unique()) == 1, "the classes are not side by side"
        seen |= set(classes.tolist())
    assert seen == set(range(10))


def test_effects_are_above_batch_norm_on_shuffled_batches():
    def row(arm, order, rate, seed, validation, test):
        return {
            "arm": arm,
            "order": order,
            "rate": rate,
            "seed": seed,
            "validation": validation,
            "test": test,
            "by_batch": test - 3,
            "recalibrated": 8 if rate < 1 else 5,
            "validation_recalibrated": 7 if rate < 1 else 4,
        }

    results = Results(
        [
            row("batch", "shuffled", 0.1, 0, 2, 2),
            row("batch", "shuffled", 0.1, 1, 2, 3),
            row("batch", "sorted", 0.1, 0, 9, 12),
            row("batch", "sorted", 0.1, 1, 9, 10),
            row("batch", "sorted", 1.0, 0, 90, 1),
            row("batch", "sorted", 1.0, 1, 8, 1),
        ]
    )
    assert above(results, "batch") == pytest.approx([10, 7])
    # recalibrated, the larger rate is the better one
    assert above(results, "batch", "recalibrated") == pytest.approx([3, 2])
    assert lost(results) == pytest.approx([3, 3])

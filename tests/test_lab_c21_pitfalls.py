"""Claim 21: its quick run, and how accuracies and findings become effects."""

import pytest

from batchnorm.lab.claims.c21_pitfalls import Pitfalls, harm, share
from batchnorm.lab.mistakes import MISTAKES
from batchnorm.lab.results import Results
from laboratory import quick

FACTS = (
    "forgotten eval",
    "missing buffers",
    "half frozen",
    "accumulated gradients",
    "half precision",
    "counted twice",
)
"""What the auditor finds however short the run is, for it measures nothing there."""


def test_the_quick_run_makes_every_mistake():
    results = quick(Pitfalls)
    assert results.distinct("mistake") == sorted(MISTAKES)
    for row in results:
        assert row["right"] > 30, f"{row['mistake']}: it learns nothing where all is right"
        assert 0 <= row["wrong"] <= 100
    for mistake in FACTS:
        (row,) = results.where(mistake=mistake)
        assert (row["found"], row["alarm"]) == (True, False)
    assert harm(results, "forgotten eval")[0] > 20
    for hypothesis in Pitfalls.hypotheses:
        assert len(hypothesis.effect(results)) == 1
    Pitfalls().figure(results)


def test_harms_and_shares():
    def row(mistake, seed, wrong, *, found, alarm=False):
        measured = {"right": 90.0, "wrong": wrong, "found": found, "alarm": alarm}
        return {"mistake": mistake, "seed": seed, **measured}

    results = Results(
        [
            row("half precision", 0, 80.0, found=True),
            row("counted twice", 0, 90.0, found=False),
            row("half precision", 1, 70.0, found=True, alarm=True),
            row("counted twice", 1, 92.0, found=True),
        ]
    )
    assert harm(results, "half precision") == [10, 20]
    assert harm(results, "counted twice") == [0, -2]
    assert share(results, "found") == [50, 100]
    assert share(results, "alarm") == [0, pytest.approx(50)]

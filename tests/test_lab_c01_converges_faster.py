"""Claim 1: its quick run, and how steps become an effect."""

import pytest

from batchnorm.lab.claims.c01_converges_faster import ConvergesFaster, gain
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns():
    results = quick(ConvergesFaster)
    assert len(results) == 8
    for row in results:
        assert row["steps_used"] <= row["steps"]
        assert 0 <= row["best"] <= 1
        assert (row["reached"] is None) == (row["best"] < 0.95)
    for network in ("perceptron", "plain"):
        best = max(row["best"] for row in results.where(network=network, arm="batch"))
        assert best > 0.5, "the network with batch norm does not learn"
    ConvergesFaster().figure(results)


def test_each_arm_is_judged_at_its_own_best_rate():
    def row(arm, rate, seed, steps):
        return {"network": "plain", "arm": arm, "rate": rate, "seed": seed, "steps_used": steps}

    results = Results(
        [
            *(row("none", 0.1, seed, steps) for seed, steps in enumerate((300, 200))),
            *(row("none", 1.0, seed, 400) for seed in range(2)),
            *(row("batch", 0.1, seed, 150) for seed in range(2)),
            *(row("batch", 1.0, seed, steps) for seed, steps in enumerate((100, 50))),
        ]
    )
    assert gain(results, "plain") == pytest.approx([3.0, 4.0])

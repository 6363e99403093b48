"""Claim 9: its quick run, and how errors and rates become effects."""

import pytest

from batchnorm.lab.claims.c09_needs_less_care import (
    NeedsLessCare,
    largest,
    saved,
    saved_less,
    widened,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns():
    results = quick(NeedsLessCare)
    assert len(results) == 6
    assert all(0 <= row["test"] <= 100 for row in results)
    assert min(row["test"] for row in results.where(arm="batch")) < 60, "chance is 90"
    judged = 0
    for hypothesis in NeedsLessCare.hypotheses:
        if "residual" in hypothesis.where:
            hypothesis.judge(results)
            judged += 1
    assert judged == 3
    NeedsLessCare().figure(results)


def made(errors):
    """Rows of one network from {(arm, remedy): {rate: test error of each seed}}."""
    return Results(
        {
            "network": "plain",
            "arm": arm,
            "remedy": remedy,
            "rate": rate,
            "seed": seed,
            "validation": each,
            "test": each,
        }
        for (arm, remedy), rates in errors.items()
        for rate, tests in rates.items()
        for seed, each in enumerate(tests)
    )


RESULTS = made(
    {
        ("batch", "neither"): {0.1: (5.0, 4.0), 1.0: (30.0, 19.0), 10.0: (90.0, 90.0)},
        ("batch", "warm-up"): {0.1: (6.0, 6.0), 1.0: (4.0, 4.0), 10.0: (19.0, 90.0)},
        ("none", "neither"): {0.1: (25.0, 20.0), 1.0: (90.0, 90.0), 10.0: (90.0, 90.0)},
        ("none", "warm-up"): {0.1: (10.0, 30.0), 1.0: (9.0, 8.0), 10.0: (90.0, 90.0)},
    }
)


def test_a_remedy_saves_what_tuned_arms_differ_by():
    assert saved(RESULTS, "plain", "batch", "warm-up") == [1.0, 0.0]
    assert saved(RESULTS, "plain", "none", "warm-up") == [16.0, 12.0]
    assert saved_less(RESULTS, "plain", "warm-up") == [15.0, 12.0]


def test_a_rate_is_stood_below_20_percent_errors():
    assert largest(RESULTS, "plain", "batch", "neither") == [0.1, 1.0]
    assert largest(RESULTS, "plain", "batch", "warm-up") == [10.0, 1.0]
    assert widened(RESULTS, "plain", "batch", "warm-up") == pytest.approx([100.0, 1.0])
    # no rate is stood: a step of the grid below the smallest
    assert largest(RESULTS, "plain", "none", "neither") == pytest.approx([0.01, 0.01])

"""Claim 2: its quick run, and how stable rates become a ratio."""

import pytest

from batchnorm.lab.claims.c02_higher_learning_rates import (
    HigherLearningRates,
    gain,
    largest_stable,
)
from batchnorm.lab.results import Results
from laboratory import quick


def row(arm, rate, seed, stable):
    return {"network": "plain", "arm": arm, "rate": rate, "seed": seed, "stable": stable}


def test_the_quick_run_tells_rates_apart():
    claim, results = HigherLearningRates(), quick(HigherLearningRates)
    assert len(results) == 16
    for each in results:
        assert 0 <= each["validation"] <= 1
        assert each["stable"] == (each["validation"] >= 0.8)
        if each["rate"] == 4.0:
            assert not each["stable"], "at such a rate nothing is learned"
    # some rates are stood: the experiment is able to see it
    assert any(each["stable"] for each in results.where(network="perceptron"))
    claim.figure(results)
    for hypothesis in claim.hypotheses[:2]:
        assert hypothesis.judge(results).interval.mean > 0


def test_the_ratio_does_not_overstate_the_border():
    """0.25 to 0.5 is where it lies without batch norm, from 4 on with it: at least 8 times."""
    results = Results(
        [
            *(row("none", rate, 0, rate <= 0.25) for rate in (0.25, 0.5, 1.0, 2.0, 4.0)),
            *(row("batch", rate, 0, rate <= 4.0) for rate in (0.25, 0.5, 1.0, 2.0, 4.0)),
        ]
    )
    assert gain(results, "plain") == pytest.approx([8.0])


def test_the_largest_stable_rate_is_each_seeds_own():
    results = Results(
        [
            *(row("none", rate, 0, rate == 1.0) for rate in (0.5, 1.0, 2.0)),
            *(row("none", rate, 1, stable=False) for rate in (0.5, 1.0, 2.0)),
        ]
    )
    # seed 1 has none: half of the smallest tried, which makes the smallest unstable one 0.5
    assert largest_stable(results, "plain", "none") == [1.0, 0.25]

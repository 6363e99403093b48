"""Asking results by name."""

import pytest

from batchnorm.lab.results import Results


def row(arm, rate, seed, validation, test):
    return {"arm": arm, "rate": rate, "seed": seed, "validation": validation, "test": test}


@pytest.fixture
def results():
    return Results(
        [
            row("batch", 0.1, 1, 0.9, 0.5),
            row("batch", 0.1, 0, 0.7, 0.6),
            row("batch", 1.0, 0, 0.9, 0.8),
            row("batch", 1.0, 1, 0.8, 0.7),
            row("none", 0.1, 0, 0.4, 0.3),
            row("none", 0.1, 1, 0.4, 0.2),
        ]
    )


def test_values_come_in_the_order_of_the_seeds(results):
    assert results.where(arm="batch", rate=0.1).values("test") == [0.6, 0.5]
    assert results.seeds == [0, 1]
    assert results.distinct("rate") == [0.1, 1.0]


def test_the_rate_is_chosen_by_the_mean_of_the_seeds_and_not_seed_by_seed(results):
    own = results.where(arm="batch")
    # by seed, 0.1 would be best for seed 1; by the mean, 1.0 is (0.85 against 0.8)
    assert own.tuned("rate", by="validation", best="high").values("test") == [0.8, 0.7]
    assert own.tuned("rate", by="validation", best="low").values("test") == [0.6, 0.5]


def test_several_trials_of_a_seed_are_not_mixed(results):
    with pytest.raises(LookupError, match="4 trials of 2 seeds"):
        results.where(arm="batch").values("test")


def test_what_is_not_there_is_said(results):
    with pytest.raises(LookupError, match="no trial has"):
        results.where(arm="layer")

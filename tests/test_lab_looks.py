"""Looks at a network in training: when, of what, and how they are compared."""

import math

import pytest
import torch
from torch import nn

from batchnorm.lab.data import Examples, Split
from batchnorm.lab.looks import looked_at, mean, ratio
from batchnorm.lab.results import Results


def made(rate, look, measures=("measure",)):
    """A linear network's run of six steps, looked at three times."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    part = Examples(x, (x[:, 0] > 0).long())
    torch.manual_seed(0)
    network = nn.Linear(4, 2)
    split = Split(part, part, part)
    budget = {"rate": rate, "steps": 6, "looks": 3, "batch": 8}
    return looked_at(network, split, look, measures=measures, seed=0, **budget)


def test_a_run_is_looked_at_at_even_steps():
    seen = []

    def look(network, part):
        assert len(part) == 8
        seen.append(network.weight.detach().clone())
        return {"loss": 1.0, "measure": 2.0 ** len(seen)}

    outcome = made(0.5, look)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert outcome["measure_curve"] == [2.0, 4.0, 8.0]
    assert outcome["measure"] == pytest.approx(4.0)
    assert outcome["learning"] == 3
    assert outcome["test"] == outcome["validation"] > 0.7


def test_a_run_that_diverged_is_as_bad_as_can_be_from_there_on():
    outcome = made(1e38, lambda network, part: {"loss": 1.0, "measure": 0.0})
    assert outcome["measure_curve"] == [1e6] * 3
    assert outcome["test"] == 0.1


def test_measures_are_numbers_of_which_there_are_ratios():
    look = {"loss": 1.0, "a": math.nan, "b": math.inf, "c": 0.0}
    outcome = made(0.1, lambda network, part: look, measures="abc")
    assert outcome["a_curve"] == outcome["b_curve"] == [1e6] * 3
    assert outcome["c_curve"] == [1e-6] * 3
    assert outcome["loss_curve"] == [1.0] * 3


def test_what_is_learned_counts_no_more():
    looks = [{"loss": 2.0, "m": 1.0}, {"loss": 0.5, "m": 4.0}, {"loss": 0.01, "m": 1e-6}]
    assert mean(looks, "m") == pytest.approx(2.0)
    assert mean(looks[2:], "m") == pytest.approx(1e-6)  # but if there is nothing else


def test_the_common_rate_is_the_one_best_without_norm():
    def row(arm, rate, validation, smoothness):
        return {
            "arm": arm,
            "rate": rate,
            "seed": 0,
            "validation": validation,
            "smoothness": smoothness,
        }

    results = Results(
        [
            row("none", 0.1, 0.9, 8.0),
            row("none", 1.0, 0.2, 1.0),
            row("batch", 0.1, 0.8, 4.0),
            row("batch", 1.0, 0.95, 0.5),
        ]
    )
    assert ratio(results, "smoothness", "common") == [2.0]
    assert ratio(results, "smoothness", "own") == [16.0]

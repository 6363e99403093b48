"""Claim 5: its quick run, the measures along the gradient, and how they become a ratio."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.lab.claims.c05_smooths_optimization import (
    MEASURES,
    STEPS_ALONG,
    SmoothsOptimization,
    along,
    norm_between,
    over_the_run,
    ratio,
)
from batchnorm.lab.data import Examples
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_looks_along_the_gradient():
    claim, results = SmoothsOptimization(), quick(SmoothsOptimization)
    assert len(results) == 4
    for row in results:
        assert 0 <= row["validation"] <= 1
        assert 0 <= row["learning"] <= row["marks"] == 4
        for name in MEASURES:
            looks = row[f"{name}_curve"]
            assert len(looks) == 4
            assert all(1e-6 <= value <= 1e6 for value in looks)
            assert min(looks) <= row[name] * (1 + 1e-9)
            assert row[name] <= max(looks) * (1 + 1e-9)
    assert max(row["validation"] for row in results.where(arm="batch")) > 0.5
    claim.figure(results)
    for hypothesis in claim.hypotheses:
        assert hypothesis.judge(results).interval.mean > 0


def test_the_measures_are_those_of_a_logistic_regression():
    """Where the gradient is known in closed form: xᵀ(softmax(xW) − y) / n."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator)
    y = torch.randint(0, 3, (30,), generator=generator)
    network = nn.Linear(4, 3, bias=False)

    def at(weight):
        logits = (x @ weight.T).double()
        likely = logits.log_softmax(1)[torch.arange(30), y]
        return float(-likely.mean()), (logits.softmax(1) - F.one_hot(y, 3)).T @ x.double() / 30

    weight, rate = network.weight.detach().clone(), 0.7
    loss, g = at(weight)
    losses, changes, slopes = [], [], []
    for step in STEPS_ALONG:
        there, other = at(weight - (step * rate * g).float())
        losses.append(there)
        changes.append(float((g - other).norm()))
        slopes.append(changes[-1] / (step * rate * float(g.norm())))
    found = along(network, Examples(x, y), rate)
    assert found == pytest.approx(
        {
            "loss": loss,
            "variation": max(losses) - min(losses),
            "change": max(changes),
            "smoothness": max(slopes),
        },
        rel=1e-4,
    )


def test_looking_changes_nothing():
    network = PlainNetwork(norm_of("batch"), depth=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    part = Examples(torch.randn(8, 1, 8, 8), torch.arange(8))
    along(network, part, 0.1)
    assert all(p.grad is None for p in network.parameters())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_where_the_loss_overflows_the_measures_are_numbers():
    network = nn.Linear(4, 3)
    part = Examples(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    assert set(along(network, part, 1e38).values()) == {1e6}


def test_a_distance_is_of_all_parameters_together():
    first = [torch.tensor([3.0, 0.0]), torch.tensor([[1.0]])]
    second = [torch.tensor([0.0, 0.0]), torch.tensor([[5.0]])]
    assert norm_between(first, second) == pytest.approx(5.0)


def test_what_is_learned_counts_no_more():
    looks = [{"loss": 2.0, "m": 1.0}, {"loss": 0.5, "m": 4.0}, {"loss": 0.01, "m": 1e-6}]
    assert over_the_run(looks, "m") == pytest.approx(2.0)
    assert over_the_run(looks[2:], "m") == pytest.approx(1e-6)  # but if there is nothing else


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

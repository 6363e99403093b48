"""Claim 5: its quick run, the measures along the gradient, and how they become a ratio."""

import math

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
)
from batchnorm.lab.data import Examples
from batchnorm.lab.networks import PlainNetwork, norm_of
from laboratory import quick


def test_the_quick_run_looks_along_the_gradient():
    claim, results = SmoothsOptimization(), quick(SmoothsOptimization)
    assert len(results) == 4
    for row in results:
        assert 0 <= row["validation"] <= 1
        assert 0 <= row["learning"] <= row["looks"] == 4
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


def test_a_distance_is_of_all_parameters_together():
    first = [torch.tensor([3.0, 0.0]), torch.tensor([[1.0]])]
    second = [torch.tensor([0.0, 0.0]), torch.tensor([[5.0]])]
    assert norm_between(first, second) == pytest.approx(5.0)


def test_where_the_loss_overflows_the_landscape_is_infinitely_rough():
    network = nn.Linear(4, 3)
    part = Examples(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    found = along(network, part, 1e38)
    assert math.isfinite(found["loss"])
    assert {found[name] for name in MEASURES} == {math.inf}

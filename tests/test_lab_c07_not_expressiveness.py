"""Claim 7: its quick run, folding into a network without norm, and the effects."""

import pytest
import torch

from batchnorm.lab.claims.c07_not_expressiveness import (
    NotExpressiveness,
    build,
    folding,
    gain,
    gap,
    moved,
    steps_shown,
    without_norm,
)
from batchnorm.lab.results import Results
from batchnorm.lab.training import evaluated
from batchnorm.models.norms import batch_norms
from laboratory import quick


def test_the_quick_run_folds_and_fits():
    claim, results = NotExpressiveness(), quick(NotExpressiveness)
    assert len(results) == 8
    for row in results:
        assert 0 <= row["fitted"] <= 1
        assert (row["reached"] is None) == (row["fitted"] < 0.9)
        assert row["steps_used"] <= row["steps"]
        assert len(row["curve"]) == 6
        if row["arm"] == "batch":
            assert 0 < row["folded"] < 1e-4
            assert row["lost"] == 0
        else:
            assert row["folded"] is None
    # in so few steps, too, there are more labels fitted than guessing fits
    assert max(row["fitted"] for row in results.where(network="perceptron")) > 0.3
    claim.figure(results)
    for hypothesis in claim.hypotheses:
        hypothesis.judge(results)


@pytest.mark.parametrize("name", ["perceptron", "plain"])
def test_a_network_without_norm_computes_what_one_with_it_does(name):
    torch.manual_seed(0)
    network = build(name, "batch")
    for layer in batch_norms(network).values():  # statistics and γ, β that matter
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(layer.weight, -1, 1)
        torch.nn.init.uniform_(layer.bias, -1, 1)
    x = torch.randn(20, 1, 8, 8)
    before = evaluated(network, x)
    other = without_norm(network, name, x)
    assert not batch_norms(other)
    assert len(batch_norms(network)) == (4 if name == "perceptron" else 8)  # itself is as it was
    torch.testing.assert_close(evaluated(network, x), before, rtol=0, atol=0)
    torch.testing.assert_close(evaluated(other, x), before, rtol=1e-4, atol=1e-4)
    assert moved(network, other, x) < 1e-5
    assert moved(network, network, x) == 0
    other.head.bias.data[0] += 0.5 * float(before.abs().max())
    assert moved(network, other, x) == pytest.approx(0.5, rel=1e-4)


def test_a_curve_ends_where_the_run_does():
    assert steps_shown(60) == [10, 20, 30, 40, 50, 60]
    assert len(steps_shown(1200)) == 24
    assert steps_shown(1200)[0] == 50
    assert steps_shown(1200)[-1] == 1200


def row(arm, rate, seed, **measured):
    return {"network": "plain", "arm": arm, "rate": rate, "seed": seed, **measured}


def test_capacity_and_speed_have_each_their_best_rate():
    results = Results(
        [
            row("none", 0.1, 0, fitted=1.0, steps_used=400, folded=None),
            row("none", 1.0, 0, fitted=0.92, steps_used=300, folded=None),
            row("batch", 0.1, 0, fitted=0.99, steps_used=200, folded=1e-6),
            row("batch", 1.0, 0, fitted=0.95, steps_used=100, folded=1e-5),
        ]
    )
    assert gap(results, "plain") == pytest.approx([-1.0])
    assert gain(results, "plain") == pytest.approx([3.0])
    assert folding(results, "plain") == [1e-6]

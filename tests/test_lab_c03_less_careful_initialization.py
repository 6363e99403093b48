"""Claim 3: its quick run, and how accuracies at scales become a spread."""

import pytest
import torch

from batchnorm.lab.claims.c03_less_careful_initialization import (
    LessCarefulInitialization,
    accuracies,
    build,
    less,
    spread,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns_at_the_usual_scale():
    claim, results = LessCarefulInitialization(), quick(LessCarefulInitialization)
    assert len(results) == 24
    for row in results:
        assert 0 <= row["validation"] <= 1
        assert 0 <= row["test"] <= 1
        if row["diverged"]:
            assert row["validation"] == row["test"] == 0.1
    for network in ("perceptron", "plain"):
        usual = results.where(network=network, arm="batch", scale=1.0)
        assert max(row["test"] for row in usual) > 0.5
    claim.figure(results)
    for hypothesis in claim.hypotheses:
        assert -100 <= hypothesis.judge(results).interval.mean <= 100


@pytest.mark.parametrize("name", ["perceptron", "plain"])
def test_the_scale_multiplies_the_weights_of_hidden_layers(name):

    weights = {}
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        network = build(name, "none", scale)
        weights[scale] = [p for p in network.features.parameters() if p.ndim > 1]
    assert len(weights[1.0]) == (4 if name == "perceptron" else 8)
    for usual, large in zip(weights[1.0], weights[10.0], strict=True):
        torch.testing.assert_close(large, 10 * usual)


def made(arm, table):
    """Rows of (scale, rate, validation, test)."""
    names = ("scale", "rate", "validation", "test")
    return [
        {"network": "plain", "arm": arm, "seed": 0, **dict(zip(names, values, strict=True))}
        for values in table
    ]


def test_the_two_readings_differ_in_the_rate_alone():
    results = Results(
        [
            *made("none", [(1.0, 0.1, 0.9, 0.8), (1.0, 1.0, 0.5, 0.99), (10.0, 0.1, 0.1, 0.2)]),
            *made("none", [(10.0, 1.0, 0.3, 0.5)]),
            *made("batch", [(1.0, 0.1, 0.9, 0.9), (1.0, 1.0, 0.8, 0.7), (10.0, 0.1, 0.9, 0.85)]),
            *made("batch", [(10.0, 1.0, 0.95, 0.95)]),
        ]
    )
    assert accuracies(results, "plain", "none", "tuned") == {1.0: [80.0], 10.0: [50.0]}
    assert accuracies(results, "plain", "none", "fixed") == {1.0: [80.0], 10.0: [20.0]}
    assert spread(results, "plain", "batch", "tuned") == pytest.approx([5.0])
    assert less(results, "plain", "tuned") == pytest.approx([30 - 5])
    assert less(results, "plain", "fixed") == pytest.approx([60 - 5])

"""Claim 17: its quick run, the laws, and how results become effects."""

import pytest
import torch
from torch import nn

from batchnorm.lab.claims.c17_layer_norm import (
    SIZES,
    SUBJECTS,
    LayerNorm,
    ahead,
    changed,
    changes_with_mode,
    changes_with_size,
    mode_changes,
    size_changes,
    times,
)
from batchnorm.lab.language import KNOWS_NOTHING
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_keeps_the_laws_and_learns():
    results = quick(LayerNorm)
    for of in ("images", "features"):
        (batch,) = results.where(subject="layer", arm="batch")
        (layer,) = results.where(subject="layer", arm="layer")
        assert layer[of] == [0.0] * len(SIZES)
        assert batch[of][-1] == 0.0
        assert min(batch[of][:-1]) > 50
    for subject in SUBJECTS:
        for row in results.where(subject=subject):
            assert (row["mode"] == 0) == (row["arm"] == "layer")
            worst = {"transformer": KNOWS_NOTHING, "policy": 10}.get(subject, 90)
            assert 0 < row["test"] < worst
    for hypothesis in LayerNorm.hypotheses:
        assert len(hypothesis.effect(results)) == 1
    LayerNorm().figure(results)


def test_bits_are_counted():
    assert changed(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 5.0])) == 25
    x = torch.randn(8, 4)
    assert changes_with_size(nn.LayerNorm(4), x, (1, 4, 8)) == [0, 0, 0]
    assert changes_with_size(nn.BatchNorm1d(4), x, (2, 8)) == [100, 0]
    assert changes_with_mode(nn.LayerNorm(4), lambda norm: norm(x)) == 0
    norm = nn.BatchNorm1d(4)
    assert changes_with_mode(norm, lambda norm: norm(x)) == 100
    assert norm.training
    assert norm.num_batches_tracked == 0


def row(subject, arm, seed, rate=0.1, **measured):
    return {"subject": subject, "arm": arm, "seed": seed, "rate": rate, **measured}


def test_each_arm_is_judged_at_its_own_best_rate():
    results = Results(
        [
            row("plain", "batch", 0, validation=3.0, test=4.0),
            row("plain", "batch", 0, rate=1.0, validation=5.0, test=1.0),
            row("plain", "layer", 0, validation=9.0, test=2.0),
            row("plain", "layer", 0, rate=1.0, validation=6.0, test=7.0),
        ]
    )
    assert ahead(results, "plain", winner="batch", loser="layer") == [3.0]
    assert times(results, "plain", winner="layer", loser="batch") == [pytest.approx(4 / 7)]


def test_the_largest_change_counts():
    results = Results(
        [
            row("layer", "layer", 0, images=[0.0, 0.5], features=[0.0, 0.25]),
            row("layer", "layer", 1, images=[0.0, 0.0], features=[0.0, 2.0]),
            row("plain", "layer", 0, mode=0.0),
            row("policy", "layer", 0, mode=1.0),
            row("plain", "layer", 1, mode=0.0),
            row("policy", "layer", 1, mode=0.0),
            row("plain", "batch", 1, mode=100.0),
        ]
    )
    assert size_changes(results) == [0.5, 2.0]
    assert mode_changes(results, "layer") == [1.0, 0.0]

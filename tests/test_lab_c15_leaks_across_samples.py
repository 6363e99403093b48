"""Claim 15: its quick run, its batches, and what is measured of them."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.lab.claims.c15_leaks_across_samples import (
    BATCH,
    LeaksAcrossSamples,
    label,
    movement,
    own,
    probes_accuracy,
    probes_loss,
    told_by_companions,
)
from batchnorm.lab.data import Examples
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_leaks_in_training_mode_of_batch_norm_alone():
    results = quick(LeaksAcrossSamples)
    assert len(results) == 6
    (batch,) = results.where(arm="batch", companions=0).rows
    (group,) = results.where(arm="group", companions=0).rows
    assert batch["validation"] < 30, "the network does not learn"
    assert batch["moved_train"] > 0
    assert batch["moved_eval"] == 0
    assert group["moved_train"] == group["moved_eval"] == group["differ_train"] == 0
    for companions in (4, 16):
        (row,) = results.where(arm="group", companions=companions).rows
        assert row["train"] == row["eval"], "group norm knows no mode"
        assert row["train"] == pytest.approx(50, abs=8), "a probe tells its label"
    LeaksAcrossSamples().figure(results)
    for hypothesis in LeaksAcrossSamples.hypotheses:
        assert len(hypothesis.effect(results)) == 1


@pytest.mark.parametrize("companions", [4, 16])
def test_companions_tell_the_label_and_probes_do_not(companions):
    digit = torch.arange(10).repeat(30)
    sides, probes = [], {0: [], 1: []}
    for chosen in islice(told_by_companions(digit, companions, seed=0), 400):
        drawn = digit[chosen]
        assert len(drawn) == BATCH
        (side,) = drawn[-companions:].unique().tolist()
        sides.append(side)
        probes[side] += drawn[:-companions].tolist()
        assert label(drawn, companions).tolist() == [side] * (BATCH - companions)
    assert sides.count(0) == sides.count(1) == 200
    for side in (0, 1):
        share = torch.bincount(torch.tensor(probes[side]), minlength=10) / len(probes[side])
        torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.02, rtol=0)


def test_the_loss_is_of_the_probes_alone():
    logits = torch.randn(6, 2)
    digit = torch.tensor([3, 7, 2, 1, 1, 1])
    expected = F.cross_entropy(logits[:3], torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(probes_loss(logits, digit, companions=3), expected)


class Shifted(nn.Module):
    """Each sample, and so much of the batch's mean."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x + self.share * x.mean(0)


def test_movement_is_that_of_the_neighbours():
    x = torch.randn(200, 3)
    assert movement(Shifted(0.0), x, "train", 0) == (0.0, 0.0)
    small, _ = movement(Shifted(1.0), x, "train", 0)
    large, differ = movement(Shifted(10.0), x, "train", 0)
    assert large == pytest.approx(10 * small, rel=1e-3)
    assert 0 < differ <= 100
    # of a mean over 32 samples 24 change: its variance is 24/32² of a sample's
    spread = x[:8].var(0).mean().sqrt().item()
    assert small == pytest.approx((24**0.5 / 32) / spread, rel=0.5)


def test_a_network_that_sees_the_batch_tells_the_label():
    class Reads(nn.Module):
        def forward(self, x):
            ones = (x == 1).double().mean() > (x == 0).double().mean()
            return F.one_hot(ones.long().expand(len(x)), 2).double()

    digit = torch.arange(10).repeat(40)
    examples = Examples(digit.float(), digit)
    assert probes_accuracy(Reads(), examples, 16, "train", 0) == 100


def test_each_arm_is_judged_at_its_own_best_rate():
    results = Results(
        {"arm": "batch", "companions": 4, "rate": rate, "seed": seed, **measured}
        for rate, measured in (
            (0.1, {"validation": 5, "train": 70}),
            (1.0, {"validation": 9, "train": 90}),
        )
        for seed in range(2)
    )
    assert own(results, "batch", 4, "train") == [70, 70]

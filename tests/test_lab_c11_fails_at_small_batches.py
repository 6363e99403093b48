"""Claim 11: its quick run, who shares statistics with whom, and its effects."""

import pytest
import torch

from batchnorm import BatchNorm2d
from batchnorm.lab.claims.c11_fails_at_small_batches import (
    MOMENTUM,
    FailsAtSmallBatches,
    Trial,
    by_itself,
    norm_for,
    over,
    over_whole,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns_with_large_batches():
    results = quick(FailsAtSmallBatches)
    assert len(results) == 15
    for row in results:
        assert all(0 <= row[part] <= 100 for part in ("train", "validation", "test"))
        assert not row["diverged"]
    for network in ("residual", "perceptron"):
        for size in (32, 64):
            assert by_itself(results, network, size)[0] < 75, "chance is 90"
    for hypothesis in FailsAtSmallBatches.hypotheses:
        hypothesis.judge(results)
    FailsAtSmallBatches().figure(results)


def test_ranks_are_normalized_apart_and_synchronized_ones_together():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 4, 4)

    def normalized(arm, size, batch=64):
        layer = norm_for(Trial("residual", arm, batch, size, 0.1, 100, 0))(3)
        assert layer.momentum == MOMENTUM
        return layer(x)

    plain = BatchNorm2d(3)
    each_rank = torch.cat([plain(part) for part in x.split(2)])
    torch.testing.assert_close(normalized("batch", 2), each_rank)
    torch.testing.assert_close(normalized("sync", 64), plain(x))
    torch.testing.assert_close(normalized("ghost", 2, 16), each_rank)
    perceptron = norm_for(Trial("perceptron", "batch", 64, 2, 0.1, 100, 0))(3)
    torch.testing.assert_close(
        perceptron(x[:, :, 0, 0])[:2].abs(), torch.ones(2, 3), atol=0.1, rtol=0
    )
    group = norm_for(Trial("residual", "group", 64, 64, 0.1, 100, 0))(8)
    assert group.num_groups == 2


def test_renorm_starts_as_batch_norm_and_ends_with_the_papers_limits():
    layer = norm_for(Trial("residual", "renorm", 2, 2, 0.1, 100, 0))(3)
    r, d = layer.statistics.r_max, layer.statistics.d_max
    for batch, limits in ((10, (1, 0)), (30, (2, 2.5)), (50, (3, 5))):
        assert (r.at(torch.tensor(batch)), d.at(torch.tensor(batch))) == pytest.approx(limits)


def test_effects_compare_tuned_arms_seed_by_seed():
    def rows(arm, batch, size, *tests):
        """At a good rate, and at one that looks better on the test images alone."""
        for seed, test in enumerate(tests):
            same = {"network": "residual", "arm": arm, "batch": batch, "size": size, "seed": seed}
            yield {**same, "rate": 0.1, "validation": 1.0, "test": test}
            yield {**same, "rate": 1.0, "validation": 2.0, "test": 0.0}

    results = Results(
        [
            *rows("batch", 64, 2, 9.0, 8.0),
            *rows("batch", 64, 32, 3.0, 4.0),
            *rows("sync", 64, 64, 2.0, 3.0),
            *rows("group", 64, 64, 4.0, 4.0),
            *rows("batch", 2, 2, 40.0, 30.0),
            *rows("group", 2, 2, 20.0, 25.0),
            *rows("renorm", 2, 2, 30.0, 31.0),
        ]
    )
    assert by_itself(results, "residual", 64) == [2.0, 3.0]
    assert over_whole(results, "residual", 2, "group") == [5.0, 4.0]
    assert over_whole(results, "residual", 32, "group") == [-1.0, 0.0]
    assert over_whole(results, "residual", 2, "sync") == [7.0, 5.0]
    assert over(results, "group") == [20.0, 5.0]
    assert over(results, "renorm") == [10.0, -1.0]

"""Claim 4: its quick run, whose statistics its arms have, and how gaps become an effect."""

import pytest
import torch

from batchnorm.lab.claims.c04_regularizes_by_noise import (
    IMAGES,
    First,
    RegularizesByNoise,
    Trial,
    build,
    closed,
    closed_by_own,
    few,
    per_doubling,
)
from batchnorm.lab.data import digits
from batchnorm.lab.results import Results
from batchnorm.models.norms import batch_norms
from laboratory import quick


def test_the_quick_run_learns_and_has_a_gap():
    results = quick(RegularizesByNoise)
    assert len(results) == 8
    for row in results:
        assert row["gap"] == row["test"] - row["train"]
        assert row["test"] < 60, "chance is 90"
        assert not row["diverged"]
    for row in results.where(arm="ghost"):
        assert row["train"] < 5 < row["test"] + 4, "few images are learned, and not the others"
    for hypothesis in RegularizesByNoise.hypotheses:
        hypothesis.judge(results)
    RegularizesByNoise().figure(results)


def test_no_image_is_learned_and_tested():
    learned, validation, test = few(digits(0))
    assert (len(learned), len(validation), len(test)) == (IMAGES, 297, 1797 - IMAGES - 297)
    assert torch.equal(test.x[-1], digits(0).train.x[-1])
    assert torch.equal(learned.y, digits(0).train.y[:IMAGES])


@pytest.mark.parametrize(("arm", "given"), [("small", 16), ("reference", 256)])
def test_small_batches_have_statistics_of_their_own_or_of_all(arm, given):
    x = torch.randn(256, 1, 14, 14)
    trial = Trial("perceptron", arm, 16, given, 0.1, 1, 0)
    torch.manual_seed(0)
    network = First(build(trial), given)
    seen = []
    (first, *_) = batch_norms(network).values()
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    logits = network(x)
    moved = x.clone()
    moved[100:] = 5.0  # not among the 16
    assert torch.equal(network(moved)[:16], logits[:16]) == (arm == "small")
    network.eval()
    assert network(x).shape == (256, 10)
    assert seen == [given, given, 256]


def test_slices_do_not_see_each_other():
    torch.manual_seed(0)
    network = build(Trial("plain", "ghost", 256, 16, 0.1, 1, 0))
    x = torch.randn(32, 1, 8, 8)
    whole = network(x)
    torch.testing.assert_close(network(x[:16]), whole[:16])
    assert not batch_norms(build(Trial("plain", "none", 256, 256, 0.1, 1, 0)))


def row(arm, batch, size, rate, seed, validation, gap, network="perceptron"):
    return {
        "network": network,
        "arm": arm,
        "batch": batch,
        "size": size,
        "rate": rate,
        "seed": seed,
        "validation": validation,
        "gap": gap,
        "test": 2 * gap,
    }


def test_effects_compare_tuned_arms_seed_by_seed():
    results = Results(
        [
            *(row("ghost", 256, 256, 0.1, seed, 10.0, 8.0 + seed) for seed in range(2)),
            *(row("ghost", 256, 256, 1.0, seed, 20.0, 0.0) for seed in range(2)),
            *(row("ghost", 256, 16, 0.1, seed, 30.0, 1.0) for seed in range(2)),
            *(row("ghost", 256, 16, 1.0, seed, 5.0, 6.0) for seed in range(2)),
            *(row("small", 16, 16, 0.1, seed, 5.0, 4.0) for seed in range(2)),
            *(row("reference", 16, 256, 0.1, seed, 5.0, 5.0 + seed) for seed in range(2)),
        ]
    )
    assert closed(results, "perceptron") == [2.0, 3.0]
    assert closed_by_own(results, 16) == [1.0, 2.0]
    assert per_doubling(results, "perceptron") == pytest.approx([0.5, 0.75])

"""Claim 18: its quick run, the shifts, and how accuracies become effects."""

import pytest
import torch

from batchnorm.lab.claims.c18_distribution_shift import (
    CHANGES,
    SHIFTS,
    DistributionShift,
    harm,
    regained,
    regained_online,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns_and_shifts():
    results = quick(DistributionShift)
    (batch,) = results.where(arm="batch")
    (group,) = results.where(arm="group")
    assert batch["clean_eval"] > 0.4
    assert group["clean_eval"] > 0.2
    for shift in SHIFTS:
        for way in ("eval", "recalibrated", "online"):
            assert 0 <= batch[f"{shift}_{way}"] <= 1
        assert batch[f"{shift}_eval"] < batch["clean_eval"]
        assert batch[f"{shift}_eval"] != batch[f"{shift}_recalibrated"]
        assert f"{shift}_online" not in group
    for hypothesis in DistributionShift.hypotheses:
        assert len(hypothesis.effect(results)) == 1
    DistributionShift().figure(results)


def test_the_shifts_are_what_they_are_called():
    x = torch.randn(50, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    changed = {name: change(x, 1) for name, change in CHANGES.items()}
    assert {each.shape for each in changed.values()} == {x.shape}
    contrast = changed["contrast"]
    torch.testing.assert_close(contrast.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(contrast.std((2, 3)), 0.3 * x.std((2, 3)))
    torch.testing.assert_close(changed["brightness"], x + 1)
    noise = changed["noise"] - x
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(CHANGES["noise"](x, 2), changed["noise"])
    level = torch.full((1, 1, 14, 14), 3.0)
    torch.testing.assert_close(CHANGES["blur"](level, 0), level)
    assert float(changed["blur"].std()) < 0.4 * float(x.std())


def test_what_is_regained_is_a_share_of_what_was_lost():
    def row(seed, rate, validation, **measured):
        return {"arm": "batch", "seed": seed, "rate": rate, "validation": validation, **measured}

    shifts = {
        f"{shift}_{way}": accuracy
        for shift in SHIFTS
        for way, accuracy in (("eval", 0.5), ("recalibrated", 0.8), ("online", 0.6))
    }
    shifts["noise_online"] = 0.8
    labels = {"labels_eval": 0.9, "labels_recalibrated": 0.85}
    results = Results(
        [
            row(0, 0.1, 0.9, clean_eval=0.9, **shifts, **labels),
            row(0, 1.0, 0.8, clean_eval=0.1, **dict.fromkeys(shifts, 0.0), **labels),
        ]
    )
    assert regained(results, "blur", "recalibrated") == [pytest.approx(75)]
    assert regained_online(results) == [pytest.approx((3 * 25 + 75) / 4)]
    assert harm(results) == [pytest.approx(5)]


def test_a_shift_that_takes_nothing_divides_by_no_zero():
    measured = {"clean_eval": 0.9, "noise_eval": 0.9, "noise_recalibrated": 0.9}
    results = Results([{"arm": "batch", "seed": 0, "rate": 1.0, "validation": 0.9, **measured}])
    assert regained(results, "noise", "recalibrated") == [0]

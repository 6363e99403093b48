"""Claim 16: its quick run, the marked text, and how losses become effects."""

from itertools import islice

import pytest
import torch

from batchnorm.lab.claims.c16_leaks_over_time import (
    LENGTH,
    MIDDLE,
    LeaksOverTime,
    blocks,
    excess,
    marked,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_leaks_in_training_mode_of_batch_norm_alone():
    results = quick(LeaksOverTime)
    assert len(results) == 6
    for row in results:
        assert 1 < row["test_eval"] < 3.8, "no better than guessing among all characters"
        assert row["moved_eval"] == 0
        if row["arm"] == "layer":
            assert row["moved_train"] == row["ahead_train"] == row["found"] == 0
            assert row["test_train"] == pytest.approx(row["test_eval"], abs=1e-5)
        else:
            assert row["moved_train"] > 0.001
            assert row["found"] == 1, "the auditor does not find the leak"
    LeaksOverTime().figure(results)
    for hypothesis in LeaksOverTime.hypotheses:
        assert len(hypothesis.effect(results)) == 1


def test_marks_and_what_follows_are_turned_batch_by_batch():
    windows = torch.randint(40, (24, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    changed = marked(windows, 4, torch.Generator().manual_seed(1))
    assert torch.equal(changed[:, :MIDDLE], windows[:, :MIDDLE])
    marks = changed[:, MIDDLE].view(6, 4)
    assert set(marks.flatten().tolist()) == {0, 13}, "a and n"
    assert all(len(each.unique()) == 1 for each in marks), "a batch has one coin"
    for own, other in zip(windows, changed, strict=True):
        later = other[MIDDLE + 1 :]
        if other[MIDDLE] == 13:
            letters = later < 26
            later = torch.where(letters, (later - 13) % 26, later)
        assert torch.equal(later, own[MIDDLE + 1 :])


def test_blocks_are_samples_side_by_side():
    seen = [chosen.tolist() for chosen in islice(blocks(22, 4, seed=0), 5)]
    assert sorted(seen) == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert seen != sorted(seen), "they are not shuffled"


def test_an_excess_is_of_batch_norm_at_its_best_rate():
    results = Results(
        {
            "text": "plain",
            "arm": "batch",
            "batch": 4,
            "rate": rate,
            "seed": seed,
            "validation": rate,
            "a": 3 * rate + seed,
            "b": rate,
        }
        for rate in (0.1, 0.3)
        for seed in range(2)
    )
    assert excess(results, 4, "a", "b") == pytest.approx([0.2, 1.2])

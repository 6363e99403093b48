"""Claim 19: its quick run, the faults of the data, and how accuracies become effects."""

import pytest
import torch

from batchnorm.lab.claims.c19_poor_data import (
    FAULTS,
    PoorData,
    costs,
    leaking,
    mislabelled,
    on_features,
    on_labels,
    saved,
)
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns_and_its_faults_cost():
    results = quick(PoorData)
    for row in results:
        assert 0 <= row["validation"] <= 1
        assert 0 <= row["test"] <= 1
    for arm in ("batch", "none"):
        assert costs(results, "unscaled leak", arm)[0] > 20
        best = max(row["test"] for row in results.where(data="scaled", arm=arm))
        assert best > 0.85, "it learns nothing"
    assert max(row["test"] for row in results.where(data="labels", arm="batch")) > 0.6
    for fault, hypothesis in zip(FAULTS, PoorData.hypotheses, strict=True):
        if fault in results.distinct("data"):
            assert len(hypothesis.effect(results)) == 1
    PoorData().figure(results)


def test_so_many_labels_are_wrong():
    y = torch.arange(10).repeat(1000)
    wrong = mislabelled(y, 0.4, 10, seed=0)
    assert float((wrong != y).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert wrong[wrong != y].bincount(minlength=10).min() > 300
    assert torch.equal(mislabelled(y, 0.0, 10, seed=0), y)
    _, parts = on_labels("labels 20 %", "none", 7)
    sound = digits(7)
    shares = [
        float((part.y != own.y).float().mean())
        for part, own in zip(parts, (sound.train, sound.validation, sound.test), strict=True)
    ]
    assert shares == [pytest.approx(0.2, abs=0.05), pytest.approx(0.2, abs=0.08), 0]


def test_a_leak_tells_the_label_until_the_test():
    part = Examples(torch.zeros(1000, 2), torch.arange(1000) % 2)
    leak = leaking(part, part.y, 1000.0, seed=0).x[:, 2]
    assert torch.equal((leak > 0).long(), part.y)
    assert float(leak.abs().mean()) == pytest.approx(1000, rel=0.02)
    for data, size in (("leak", 1.0), ("unscaled leak", 1000.0)):
        _, (learned, validation, test) = on_features(data, "batch", 1)
        right = [float(((p.x[:, -1] > 0) == p.y).float().mean()) for p in (learned, validation)]
        assert right == [1, 1]
        assert float(((test.x[:, -1] > 0) == test.y).float().mean()) == pytest.approx(0.5, abs=0.03)
        assert float(test.x[:, -1].abs().mean()) == pytest.approx(size, rel=0.02)


def test_what_is_saved_is_a_share_of_what_was_lost():
    def row(data, arm, test, rate=0.1, validation=0.9):
        measured = {"validation": validation, "test": test}
        return {"data": data, "arm": arm, "rate": rate, "seed": 0, **measured}

    results = Results(
        [
            row("labels", "none", 0.9),
            row("labels", "batch", 0.95),
            row("labels 40 %", "none", 0.7),
            row("labels 40 %", "none", 0.2, rate=1.0, validation=0.8),
            row("labels 40 %", "batch", 0.8),
            row("labels 20 %", "none", 0.9),
            row("labels 20 %", "batch", 0.94),
        ]
    )
    assert costs(results, "labels 40 %", "none") == [pytest.approx(20)]
    assert saved(results, "labels 40 %") == [pytest.approx(25)]
    assert saved(results, "labels 20 %") == [pytest.approx(-100)]

"""Claim 14: its quick run, its streams, and how errors become effects."""

import pytest
import torch
from torch import nn

from batchnorm.lab.claims.c14_one_by_one import (
    MODES,
    STREAMS,
    OneByOne,
    difference,
    dimmed,
    error_one_by_one,
    stream,
)
from batchnorm.lab.data import Examples
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_learns():
    results = quick(OneByOne)
    (row,) = results
    for name in STREAMS:
        for mode in MODES:
            assert 0 <= row[f"{mode}_{name}"] <= 100
    assert row["eval_clean"] < 30, "the network does not learn"
    assert row["eval_sorted"] == pytest.approx(row["eval_clean"]), "inference knows no order"
    assert row["train_sorted"] == pytest.approx(row["train_clean"])
    OneByOne().figure(results)
    for hypothesis in OneByOne.hypotheses:
        assert len(hypothesis.effect(results)) == 1


def test_a_dimmed_image_has_less_contrast_and_is_darker():
    x = torch.tensor([[1.0, -1.0], [2.0, 4.0]])
    assert torch.equal(dimmed(x, torch.zeros(2)), x)
    expected = torch.tensor([[-0.2, -0.8], [2.0, 4.0]])
    torch.testing.assert_close(dimmed(x, torch.tensor([1.0, 0.0])), expected)


def test_streams_hold_every_image_with_its_label():
    test = Examples(torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([1, 0, 2, 1, 0, 2]))
    sorted_ = stream(test, "sorted")
    assert sorted_.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted_.x.flatten().tolist() == [1, 4, 0, 3, 2, 5]
    drifting = stream(test, "drifting").x.flatten()
    assert drifting[0] == test.x.flatten()[0]
    assert drifting[-1] == stream(test, "shifted").x.flatten()[-1]


def test_reading_a_stream_leaves_the_network_as_it_was():
    network = PlainNetwork(norm_of("batch"), depth=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    samples = Examples(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    for mode in MODES:
        error_one_by_one(network, samples, mode)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_own_statistics_are_those_of_one_sample():
    class Sees(nn.Module):
        def forward(self, x):
            assert len(x) == 1, "several samples at a time"
            return torch.eye(2)[:1]

    samples = Examples(torch.randn(4, 1, 8, 8), torch.tensor([0, 0, 0, 1]))
    assert error_one_by_one(Sees(), samples, "train") == pytest.approx(25)


def test_effects_are_differences_at_the_best_rate():
    results = Results(
        {"rate": rate, "seed": seed, "validation": rate, "a": 10 * seed + 5, "b": rate}
        for rate in (0.1, 0.3)
        for seed in range(2)
    )
    assert difference(results, "a", "b") == pytest.approx([4.9, 14.9])

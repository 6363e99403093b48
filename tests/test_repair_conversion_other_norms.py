"""Conversions to norms of other kinds: what is kept, what is lost, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.repair.conversion import ChannelLayerNorm, ChannelRMSNorm, convert

KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TARGETS = ("group_norm", "instance_norm", "layer_norm", "rms_norm", "identity")


def batch(dims, channels, n=3):
    return torch.randn(n, channels, *[4] * dims, dtype=torch.float64)


def tried(norm):
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return norm


def by_definition(to, x, weight, bias, eps, groups):
    """float64 NumPy, in terms of whom a value is averaged with."""
    x = x.numpy()
    n, c, *positions = x.shape
    shape = (1, c, *[1] * len(positions))
    if to == "identity":
        return x
    if to == "rms_norm":
        y = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
        return y * weight.reshape(shape)
    if to == "layer_norm":
        mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        y = (x - mean) / np.sqrt(var + eps)
    else:
        groups = c if to == "instance_norm" else groups
        parts = x.reshape(n, groups, -1)
        mean, var = parts.mean(-1, keepdims=True), parts.var(-1, keepdims=True)
        y = ((parts - mean) / np.sqrt(var + eps)).reshape(x.shape)
    return y * weight.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize(
    ("to", "dims", "training"),
    [(to, 1 + i % 3, i % 2 == 0) for i, to in enumerate(2 * TARGETS)],
)
def test_it_computes_what_it_says_with_the_same_parameters(to, dims, training):
    model = nn.Sequential(tried(KINDS[dims](12, eps=0.2))).double().train(training)
    norm, weight, bias, x = model[0], model[0].weight, model[0].bias, batch(dims, 12)
    norm.note = "mine"
    norm.register_forward_hook(lambda m, i, y: None)
    weight.requires_grad_(False)
    result = convert(model, to=to, example=x)
    assert list(result.converted) == ["0"]
    assert model[0] is norm
    assert (norm.training, norm.note, len(norm._forward_hooks)) == (training, "mine", 1)
    expected = by_definition(to, x, weight.numpy(), bias.detach().numpy(), 0.2, 6)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    if to != "identity":
        assert norm.weight is weight
        assert not norm.weight.requires_grad
        assert norm.eps == 0.2
    assert ("bias" in dict(norm.named_parameters())) == (to not in ("rms_norm", "identity"))
    assert list(norm.buffers()) == []
    assert result.needs_fine_tuning
    assert "needs fine-tuning" in repr(result)
    assert result.difference > 0.01
    lost = {"rms_norm": "β, running statistics", "identity": "γ, β, running statistics"}
    assert result.lost == {"0": lost.get(to, "running statistics")}


@pytest.mark.parametrize("to", TARGETS)
def test_the_modules_are_pytorchs_own(to):
    norm = nn.BatchNorm2d(8)
    convert(norm, to=to, example=torch.randn(2, 8, 4, 4))
    kinds = {
        "group_norm": nn.GroupNorm(4, 8),
        "instance_norm": nn.InstanceNorm2d(8, affine=True),
        "layer_norm": ChannelLayerNorm(8),
        "rms_norm": ChannelRMSNorm(8, eps=1e-5),
        "identity": nn.Identity(),
    }
    written = kinds[to]
    assert type(norm) is type(written)
    assert repr(norm) == repr(written)
    assert vars(norm).keys() == vars(written).keys()
    assert list(norm.state_dict()) == list(written.state_dict())
    written.load_state_dict(norm.state_dict())
    assert isinstance(
        written, (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, nn.RMSNorm, nn.Identity)
    )


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
@pytest.mark.parametrize("to", TARGETS)
def test_a_layer_without_affine_numbers_stays_without(to, options):
    norm = batchnorm.BatchNorm2d(8, **options).double()
    names = [name for name, _ in norm.named_parameters()]
    x = batch(2, 8)
    convert(norm, to=to, example=x)
    assert [n for n, _ in norm.named_parameters()] == ([] if to == "identity" else names)
    weight, bias = np.ones(8), np.zeros(8)
    expected = by_definition(to, x, weight, bias, 1e-5, 4)
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(st.integers(2, 300), st.integers(1, 70))
def test_groups_divide_the_channels_and_leave_two_in_each(channels, groups):
    norm = nn.BatchNorm1d(channels)
    convert(norm, to="group_norm", groups=groups)
    fit = [g for g in range(1, groups + 1) if channels % g == 0 and channels // g >= 2]
    assert norm.num_groups == max(fit)
    assert norm.num_channels == channels


def test_72_channels_do_not_divide_by_32():
    model = nn.Sequential(nn.BatchNorm2d(72), nn.BatchNorm2d(64), nn.BatchNorm2d(4))
    convert(model, to="group_norm")
    assert [m.num_groups for m in model] == [24, 32, 2]
    with torch.no_grad():
        model[2].weight.fill_(1)
        assert model[2](torch.randn(3, 4, 1, 1)).abs().min() > 0.1  # GroupNorm(4, 4) answers 0


VALUES = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("to", "norm", "example", "reason"),
    [
        ("group_norm", nn.BatchNorm1d(1), None, "pass example="),
        ("group_norm", nn.BatchNorm1d(1), VALUES[:, :1], "normalized by itself"),
        ("group_norm", nn.BatchNorm2d(1), torch.randn(4, 1, 1, 1), "normalized by itself"),
        ("instance_norm", nn.BatchNorm1d(3), None, "pass example="),
        ("instance_norm", nn.BatchNorm1d(3), VALUES, "one position"),
        ("instance_norm", nn.BatchNorm1d(4), torch.randn(4, 4), "one position"),
        ("instance_norm", nn.BatchNorm2d(3), torch.randn(4, 3, 1, 1), "one position"),
        ("layer_norm", nn.BatchNorm2d(1), None, "one channel"),
        ("rms_norm", nn.BatchNorm2d(1), None, "one channel"),
    ],
)
def test_a_value_that_would_be_normalized_by_itself_is_refused(to, norm, example, reason):
    kind = type(norm)
    result = convert(nn.Sequential(norm), to=to, example=example)
    assert reason in result.skipped["0"]
    assert type(norm) is kind
    assert not result.needs_fine_tuning


def test_one_channel_of_several_positions_is_a_group():
    norm = nn.BatchNorm2d(1)
    convert(norm, to="group_norm", example=torch.randn(2, 1, 3, 3))
    assert (norm.num_groups, norm.num_channels) == (1, 1)


def trained_only_in(norm, what):
    with torch.no_grad():
        getattr(norm, what)[:1] += 1
    return norm


@pytest.mark.parametrize(
    ("norm", "trained"),
    [
        (nn.BatchNorm2d(4), False),
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), False),
        (trained_only_in(nn.BatchNorm2d(4), "running_mean"), True),
        (trained_only_in(nn.BatchNorm2d(4), "running_var"), True),
        (trained_only_in(nn.BatchNorm2d(4, track_running_stats=False), "weight"), True),
        (trained_only_in(nn.BatchNorm2d(4, track_running_stats=False), "bias"), True),
    ],
)
def test_fine_tuning_is_needed_where_something_was_trained(norm, trained):
    result = convert(nn.Sequential(norm), to="group_norm")
    assert result.needs_fine_tuning is trained
    assert ("fine-tuning" in repr(result)) is trained
    counted = nn.BatchNorm2d(4)
    counted.num_batches_tracked.fill_(1)
    assert convert(counted, to="group_norm").needs_fine_tuning


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("ours", [False, True])
def test_undo_brings_everything_back_to_the_bit(to, ours):
    model = nn.Sequential(tried((batchnorm if ours else nn).BatchNorm2d(6, momentum=None)))
    x = torch.randn(3, 6, 4, 4)
    model(x)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    norm, keys = model[0], vars(model[0]).keys() | set()
    tensors = [id(t) for t in (*norm.parameters(), *norm.buffers())]
    before, expected = copy.deepcopy(model.state_dict()), model.eval()(x)
    steps = copy.deepcopy(optimizer.state_dict())
    result = convert(model, to=to, optimizer=optimizer, example=x)
    kept = {"rms_norm": 1, "identity": 0}.get(to, 2)
    assert (len(optimizer.param_groups[0]["params"]), len(optimizer.state)) == (kept, kept)
    result.undo()
    assert type(model[0]).__name__ == "BatchNorm2d"
    assert vars(norm).keys() == keys
    assert (norm.momentum, norm.track_running_stats, norm.affine) == (None, True, True)
    assert [id(t) for t in (*norm.parameters(), *norm.buffers())] == tensors
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(model(x), expected)
    again = optimizer.state_dict()
    assert again["param_groups"] == steps["param_groups"]
    assert all(
        torch.equal(again["state"][i]["exp_avg"], s["exp_avg"]) for i, s in steps["state"].items()
    )


def test_undo_keeps_the_order_of_the_state_dict():
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("own", nn.Parameter(torch.zeros(1)))
    keys = list(norm.state_dict())
    convert(norm, to="rms_norm").undo()
    assert list(norm.state_dict()) == keys
    convert(norm, to="identity").undo()
    assert list(norm.state_dict()) == keys


def test_undo_keeps_what_was_trained_since_and_follows_the_device():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model(torch.randn(3, 4, 2, 2))
    mean = model[0].running_mean.clone()
    result = convert(model, to="rms_norm")
    with torch.no_grad():
        model[0].weight.fill_(3)
    model[0].eps = 0.25
    result.undo()
    assert (model[0].weight == 3).all()
    assert model[0].eps == 0.25
    assert torch.equal(model[0].running_mean, mean)
    result = convert(model, to="rms_norm")
    model.to("meta")
    result.undo()
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_conversion_of_a_conversion_is_undone_in_turn():
    model = nn.Sequential(nn.BatchNorm2d(4))
    keys = vars(model[0]).keys() | set()
    first = convert(model, to="batchnorm")
    second = convert(model, to="group_norm")
    assert convert(model, to="original").converted == {}  # no batch norm is there
    second.undo()
    assert type(model[0]) is batchnorm.BatchNorm2d
    first.undo()
    assert type(model[0]) is nn.BatchNorm2d
    assert vars(model[0]).keys() == keys


@pytest.mark.parametrize("kind", [ChannelLayerNorm, ChannelRMSNorm])
def test_norms_over_channels_are_pytorchs_with_channels_last(kind):
    layer = kind(5, eps=1e-3).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    x = batch(2, 5)
    base = kind.__mro__[1]
    expected = base.forward(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[:, :, 0, 0]), base.forward(layer, x[:, :, 0, 0]))

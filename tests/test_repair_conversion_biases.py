"""Biases that batch norms take out again, taken out of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import Ghost, Renorm, Running
from batchnorm.repair.conversion import convert
from test_repair_conversion_fusion import Undecided, chain
from test_repair_conversion_others import FrozenBatchNorm2d, randomized

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), 0),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), 1),
    "conv2d, grouped": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 2),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, padding=1, padding_mode="circular"), 3),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), 2),
    "transposed 1d, grouped": (lambda: nn.ConvTranspose1d(3, 6, 3, groups=3), 1),
}
POLICIES = {
    "torch": None,
    "ours": batchnorm.Batch(),
    "ghost": Ghost(4),
    "renorm": Renorm(1.5, 0.5),
    "running": Running(),
}


def inputs(dims, n=8):
    return 3 * torch.randn(n, 3, *[5] * dims, dtype=torch.float64) + 1


def trained(model, dims):
    for _ in range(3):
        model(inputs(dims))
    return model


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "torch") for name in LAYERS), *(("linear", policy) for policy in POLICIES)],
)
def test_outputs_and_gradients_stay_in_training_and_in_eval(name, policy):
    make, dims = LAYERS[name]
    layer = make()
    norm = NORMS[max(dims, 1)](layer.bias.numel())
    model = trained(chain(layer, norm).double(), dims)
    with torch.no_grad():
        layer.bias.mul_(20)
    trained(model, dims)
    if POLICIES[policy] is not None:
        convert(model, to=POLICIES[policy])
    twin = copy.deepcopy(model)
    result = convert(model, to="drop_bias", example=inputs(dims))
    assert list(result.converted) == ["0"]
    assert layer.bias is None
    assert "0.bias" not in model.state_dict()
    assert result.difference < 1e-12
    before, after = result.parameters
    assert before - after == norm.num_features
    for training in (False, True, False):  # the running mean goes on as it would have
        x = inputs(dims)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = model.train(training)(a), twin.train(training)(b)
        torch.testing.assert_close(y, expected)
        (y**3).sum().backward()
        (expected**3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        expected = twin[1].running_mean - twin[0].bias
        torch.testing.assert_close(model[1].running_mean, expected)


def image(n=4):
    return torch.randn(n, 3, 6, 6)


class Shared(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.other, self.form = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), form
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.task = 0

    def forward(self, x):
        y = self.conv(x)
        if self.form == "two norms":
            return self.one(y) + self.two(y)
        if self.form == "two calls":
            return self.one(y) + self.two(self.conv(2 * x))
        if self.form == "a norm of two":
            return self.one(y) + self.one(self.other(x))
        if self.form == "a call without":
            return self.one(y) + self.conv(2 * x)
        if self.form == "shortcut":
            return self.one(y) + y
        if self.form == "returned":
            return self.one(y), y
        if self.form == "a function between":
            return self.one(torch.relu(y))
        if self.form == "in place between":
            y.add_(x)
            return self.one(y)
        if self.form == "in training":
            return self.one(y) if self.training else y
        if self.form == "taken":
            return self.one(y) + self.conv.bias.sum()
        if self.form == "switched":
            return (self.one, self.two)[self.task](y)
        return self.one(y, residual=y)


LOST = ("two norms", "two calls")
KEPT = {
    "a norm of two": "normalizes other outputs too",
    "a call without": "no module",
    "shortcut": "several operations",
    "returned": "several operations",
    "a function between": "no module",
    "in place between": "",
    "in training": "no module",
    "taken": "something else computes with its bias",
    "switched": "calls at other times",
    "residual": "",
}


def shared(form, traced):
    model = Shared(form)
    if form not in ("two norms", "two calls", "switched"):
        model.two = nn.Identity()
    if form == "residual":
        convert(model, to="batchnorm")
    if form != "a norm of two":
        model.other = nn.Identity()
    for _ in range(3):
        model(image())
    return model if traced else Undecided(model)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("form", LOST)
def test_a_convolution_all_of_whose_outputs_are_normalized_loses_its_bias(form, traced):
    model, x = shared(form, traced), image()
    twin = copy.deepcopy(model)
    result = convert(model, to="drop_bias", example=None if traced else x)
    assert len(result.converted) == 1
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(model.train()(x), twin.train()(x))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("form", KEPT)
def test_a_bias_that_something_else_sees_stays_and_the_result_says_why(form, traced):
    model = shared(form, traced)
    before = copy.deepcopy(model.state_dict())
    result = convert(model, to="drop_bias", example=None if traced else image())
    assert result.converted == {}
    assert all(KEPT[form] in reason for reason in list(result.skipped.values())[:1])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * (1 + self.bias.sum())


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


def hooked(layer, register):
    getattr(layer, register)(lambda *a: None)
    return layer


def non_finite():
    layer = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        layer.bias[1] = torch.inf
    return layer


STAY = {
    "no norm": (lambda: chain(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), "no batch norm"),
    "an activation": (lambda: chain(nn.Conv2d(3, 4, 1), nn.ReLU()), "no batch norm"),
    "never called": (lambda: nn.ModuleDict({"a": nn.Conv2d(3, 4, 1)}), "does not call it"),
    "its own forward": (lambda: chain(Own(3, 4, 1), nn.BatchNorm2d(4)), "in a way of its own"),
    "the norm's own": (lambda: chain(nn.Conv2d(3, 4, 1), OwnNorm(4)), "would be lost: forward"),
    "hooks": (
        lambda: chain(hooked(nn.Conv2d(3, 4, 1), "register_forward_hook"), nn.BatchNorm2d(4)),
        "it has hooks",
    ),
    "the norm's hooks": (
        lambda: chain(nn.Conv2d(3, 4, 1), hooked(nn.BatchNorm2d(4), "register_forward_pre_hook")),
        "1 has hooks",
    ),
    "infinite": (lambda: chain(non_finite(), nn.BatchNorm2d(4)), "not finite"),
    "lazy": (lambda: chain(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), "lazy"),
    "a lazy norm": (lambda: chain(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d()), "lazy"),
    "unseen": (lambda: chain(nn.Linear(3, 4), nn.BatchNorm1d(4)), "pass example="),
}


class Anything(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("name", STAY)
def test_a_bias_whose_way_is_not_known_stays(name):
    make, reason = STAY[name]
    model = make()
    if isinstance(model, nn.ModuleDict):
        model = nn.Sequential(Anything())
        model.unused = make()
        model = Around(model)
    result = convert(model, to="drop_bias", where="*")
    assert result.converted == {}
    (text,) = result.skipped.values()
    assert reason in text


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model[0](x)


def test_a_layer_that_no_norm_follows_is_told_of_only_where_it_was_named():
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    assert convert(model(), to="drop_bias").skipped == {}
    assert list(convert(model(), to="drop_bias", where="2").skipped) == ["2"]


def test_a_bias_along_another_axis_stays():
    model = chain(nn.Linear(6, 7), nn.BatchNorm1d(7))  # features, then a norm over 7 time steps
    result = convert(model, to="drop_bias", example=torch.randn(4, 7, 6))
    assert "another dimension" in result.skipped["0"]
    result = convert(model, to="drop_bias", example=torch.randn(4, 6))
    assert list(result.converted) == ["0"]


def test_a_frozen_norm_takes_the_bias_into_its_mean():
    model, x = chain(nn.Conv2d(3, 3, 1), randomized(FrozenBatchNorm2d(3))), image()
    expected = model(x)
    assert list(convert(model, to="drop_bias", example=x).converted) == ["0"]
    torch.testing.assert_close(model(x), expected)
    assert type(model[1]) is FrozenBatchNorm2d
    model = chain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    expected = model(x)
    convert(model, to="drop_bias")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_the_optimizer_goes_on_without_the_bias_and_with_it_again_after_undo(make):
    model = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    bias = model[0].bias
    optimizer = make([{"params": [bias], "lr": 0.5}, {"params": [
        p for p in model.parameters() if p is not bias
    ]}], lr=0.1)  # fmt: skip

    def train(model, optimizer):
        torch.manual_seed(3)
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()

    train(model, optimizer)
    held = [list(map(id, group["params"])) for group in optimizer.param_groups]
    state = {id(p): s for p, s in optimizer.state.items()}
    twin, other = copy.deepcopy((model, optimizer))
    result = convert(model, to="drop_bias", optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 5]
    assert id(bias) not in {id(p) for p in optimizer.state}
    train(model, optimizer)
    train(twin, other)
    torch.testing.assert_close(model[0].weight, twin[0].weight)
    torch.testing.assert_close(model[2].bias, twin[2].bias)
    x = image()
    expected = model.eval()(x)
    result.undo()
    assert model[0].bias is bias
    torch.testing.assert_close(model(x), expected)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == held
    assert {id(p): s for p, s in optimizer.state.items()}.keys() == state.keys()


def test_a_bias_that_two_layers_share_stays_with_the_other():
    model = chain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].bias = model[0].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, to="drop_bias", optimizer=optimizer)
    assert model[0].bias is None
    assert any(p is model[2].bias for p in optimizer.param_groups[0]["params"])


def test_undo_is_exact_where_nothing_was_trained():
    model = trained(chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), 2).float()
    before = copy.deepcopy(model.state_dict())
    result = convert(model, to="drop_bias", example=image())
    assert list(model.state_dict()) != list(before)
    result.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_where_means_the_layers_with_biases():
    model = chain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert list(convert(model, to="drop_bias", where="2").converted) == ["2"]
    with pytest.raises(ValueError, match="none of the model's 1 biased layers: '0'"):
        convert(model, to="drop_bias", where="2")
    assert convert(nn.BatchNorm2d(3), to="drop_bias").converted == {}


def test_what_is_made_in_inference_mode_can_be_trained_with():
    model, x = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    with torch.inference_mode():
        result = convert(model, to="drop_bias")
        assert not model[1].running_mean.is_inference()
    model.eval()(x).sum().backward()
    model[1].running_mean.add_(1)  # or undo would put the same tensor back
    with torch.inference_mode():
        result.undo()
    assert not model[1].running_mean.is_inference()
    model(x).sum().backward()


def test_wide_and_narrow_statistics_made_in_inference_mode_can_be_trained_with():
    norm = nn.BatchNorm2d(4).bfloat16()
    for to in ("batchnorm", "torch"):
        with torch.inference_mode():
            convert(norm, to=to)
        assert not norm.running_var.is_inference()
    norm = nn.BatchNorm2d(4)
    result = convert(norm, to="batchnorm")
    norm.bfloat16()
    with torch.inference_mode():
        result.undo()
    assert norm.running_var.dtype == torch.bfloat16
    assert not norm.running_var.is_inference()

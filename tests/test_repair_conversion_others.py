"""Layers of timm, torchvision and detectron2, written as they are there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import Ghost
from batchnorm.repair.conversion import convert


def chain(*modules):
    return nn.Sequential(*modules)


def images(n=4):
    return torch.randn(n, 3, 6, 6)


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels, act=None, drop=None, eps=1e-5):
        super().__init__(channels, eps=eps)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def randomized(norm):
    for name, tensor in norm.state_dict().items():
        if name != "num_batches_tracked":
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return norm


@pytest.mark.parametrize("training", [True, False])
def test_timms_norm_becomes_one_layer_with_its_activation_and_comes_back(training):
    model, x = chain(randomized(BatchNormAct2d(3, nn.SiLU(), eps=1e-3))).train(training), images()
    twin, act = copy.deepcopy(model), model[0].act
    keys, modules = vars(model[0]).keys() | set(), list(model[0]._modules)
    parameters = [id(p) for p in model.parameters()]
    convert(model, to="batchnorm")
    assert type(model[0]) is batchnorm.BatchNorm2d
    assert (str(model[0].act), model[0].eps) == ("silu", 1e-3)
    torch.testing.assert_close(model(x), twin(x))
    result = convert(model, to="torch")
    assert "its activation silu has no place" in result.skipped["0"]
    convert(model, to="original")
    assert type(model[0]) is BatchNormAct2d
    assert model[0].act is act
    assert (vars(model[0]).keys(), list(model[0]._modules)) == (keys, modules)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == list(twin.state_dict())
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


class Louder(BatchNormAct2d):
    def forward(self, x):
        return 1.01 * super().forward(x)


Louder.__name__ = "BatchNormAct2d"


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (BatchNormAct2d(3, nn.Softplus()), "ends in Softplus"),
        (BatchNormAct2d(3, drop=nn.Dropout(0.1)), "drops values"),
        (Louder(3), "computes something else"),
    ],
)
def test_timms_norm_that_does_more_is_left_as_it_is(norm, reason):
    model = chain(norm)
    kind = type(norm)
    for to in ("batchnorm", "sync", "torch", "group_norm"):
        assert reason in convert(model, to=to).skipped["0"]
    assert type(model[0]) is kind


def test_a_frozen_norm_becomes_a_frozen_layer_of_the_same_numbers_and_comes_back():
    model, x = chain(nn.Conv2d(3, 3, 1), randomized(FrozenBatchNorm2d(3, eps=0.1))), images()
    expected = model(x)
    keys = vars(model[1]).keys() | set()
    state = copy.deepcopy(model.state_dict())
    result = convert(model, to="batchnorm", example=x)
    assert result.difference < 1e-5
    layer = model[1]
    assert type(layer) is batchnorm.BatchNorm2d
    assert (layer.num_features, layer.eps) == (3, 0.1)
    assert not any(p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(model.train()(x), expected)  # frozen in training too
    assert torch.equal(layer.running_mean, state["1.running_mean"])
    assert "unfreeze() it first" in convert(model, to="torch").skipped["1"]
    convert(model, to="original")
    assert type(model[1]) is FrozenBatchNorm2d
    assert vars(model[1]).keys() == keys
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert list(model[1].parameters()) == []
    assert torch.equal(model(x), expected)


def test_a_frozen_norm_can_learn_once_it_is_a_layer_here():
    model = chain(randomized(FrozenBatchNorm2d(3)))
    convert(model, to="batchnorm")
    model[0].unfreeze()
    assert all(p.requires_grad for p in model[0].parameters())
    model(images())
    assert model[0].num_batches_tracked == 1
    convert(model, to="torch")
    assert type(model[0]) is nn.BatchNorm2d


def test_undoing_brings_a_frozen_norm_and_its_buffers_back():
    norm = randomized(FrozenBatchNorm2d(3))
    buffers = [id(b) for b in norm.buffers()]
    convert(norm, to="batchnorm").undo()
    assert type(norm) is FrozenBatchNorm2d
    assert [id(b) for b in norm.buffers()] == buffers


def test_a_frozen_norm_that_does_not_tell_its_eps_or_does_otherwise_is_left_as_it_is():
    silent = FrozenBatchNorm2d(3)
    del silent.eps
    wrong = type("FrozenBatchNorm2dTimesTwo", (FrozenBatchNorm2d,), {"forward": lambda s, x: 2 * x})
    model = chain(silent, wrong(3), FrozenBatchNorm2d(3))
    result = convert(model, to="batchnorm")
    assert "does not tell its eps" in result.skipped["0"]
    assert "computes something else" in result.skipped["1"]
    assert list(result.converted) == ["2"]
    assert "unfreeze() it first" in convert(chain(FrozenBatchNorm2d(3)), to=Ghost(2)).skipped["0"]
    assert "do not learn" in convert(chain(FrozenBatchNorm2d(3)), to="group_norm").skipped["0"]


class Tripled(BatchNormAct2d):
    def forward(self, x):
        return 3 * super().forward(x)


Tripled.__name__ = "BatchNormAct2d"


def test_a_norm_is_tried_with_values_that_its_own_numbers_make_large_and_small():
    for mean in (-100.0, 0.0, 100.0):  # of -2 to 2 a ReLU behind it would see no more than zeros
        norm = Tripled(3)
        norm.running_mean.fill_(mean)
        assert "computes something else" in convert(norm, to="batchnorm").skipped[""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_whose_mean_is_far_from_zero_is_no_other_for_its_rounding(dtype):
    norm = BatchNormAct2d(3).to(dtype)
    norm.running_mean.fill_(1e4)
    convert(norm, to="batchnorm")
    assert type(norm) is batchnorm.BatchNorm2d


class Held(nn.Module):
    """Four buffers and eps, under a name that does not tell."""

    def __init__(self, channels, moves=False):
        super().__init__()
        self.eps, self.moves = 1e-5, moves
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.moves and self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean.mul_(0.9).add_(mean, alpha=0.1)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - mean * scale).reshape(1, -1, 1, 1)


def test_a_frozen_norm_is_known_by_what_it_holds():
    model, x = chain(nn.Conv2d(3, 3, 1), randomized(Held(3))), images()
    expected = model(x)
    result = convert(model, to="batchnorm", example=x)
    assert list(result.converted) == ["1"]
    assert type(model[1]) is batchnorm.BatchNorm2d
    torch.testing.assert_close(model.train()(x), expected)
    with pytest.raises(ValueError, match="Held does not tell how many dimensions"):
        convert(Held(3), to="batchnorm")


def test_a_norm_of_four_buffers_that_uses_the_batch_in_training_is_not_frozen():
    norm = randomized(Held(3, moves=True)).eval()
    mean = norm.running_mean.clone()
    result = convert(norm, to="batchnorm", example=images())
    assert "computes something else" in result.skipped[""]
    assert torch.equal(norm.running_mean, mean)  # though it was tried
    assert not norm.training


def test_an_instance_norm_that_tracks_is_no_batch_norm():
    result = convert(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), to="batchnorm")
    assert (result.converted, result.skipped) == ({}, {})

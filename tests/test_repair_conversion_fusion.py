"""Norms that take over activations, and give them back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import DomainBatchNorm, Ghost, Sync
from batchnorm.repair.conversion import convert


class Block(nn.Module):
    """As torchvision's: one ReLU, registered before all else, for three places."""

    def __init__(self, shortcut=False):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.norm2, self.norm1 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv2, self.conv1 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(x + y) if self.shortcut else self.relu(y)


class Undecided(nn.Module):
    """Control flow that no tracer follows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() > -1e9 else x


def chain(*modules):
    return nn.Sequential(*modules)


def images(n=4):
    return torch.randn(n, 3, 6, 6)


def trained(model):
    for _ in range(3):
        model(2 * images() + 1)
    return model


ACTIVATIONS = [  # each read in one of the two ways
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.SiLU(), nn.ELU(0.5), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.Hardswish(), nn.Sigmoid(), nn.Tanh(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "traced"), [(act, i % 2 == 0) for i, act in enumerate(ACTIVATIONS)], ids=str
)
def test_a_norm_takes_over_the_activation_behind_it_and_gives_it_back(act, traced):
    model = trained(chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), copy.deepcopy(act), nn.Flatten()))
    whole = model if traced else Undecided(model)
    twin, keys, x = copy.deepcopy(whole), vars(model[2]).keys() | set(), images()
    result = convert(whole, to="batchnorm", fuse=True, example=x)
    assert list(result.fused) == ["1" if traced else "model.1"]
    assert type(model[2]) is nn.Identity
    for m in (whole, twin):
        m.train()
    x = images().requires_grad_()
    torch.testing.assert_close(whole(x), twin(x))
    torch.testing.assert_close(whole.eval()(x), twin.eval()(x))
    assert result.difference < 1e-5
    convert(whole, to="torch")
    assert type(model[1]) is nn.BatchNorm2d
    assert repr(model[2]) == repr(act)
    assert vars(model[2]).keys() == keys
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value)


def test_an_activation_of_several_norms_is_taken_over_where_it_follows_norms_alone():
    block, x = trained(Block()), images()
    twin = copy.deepcopy(block)
    result = convert(block, to="batchnorm", fuse=True)
    assert result.fused == {"norm1": "relu", "norm2": "relu"}
    assert type(block.relu) is nn.Identity
    torch.testing.assert_close(block(x), twin(x))
    torch.testing.assert_close(block.eval()(x), twin.eval()(x))
    result.undo()
    assert type(block.relu) is nn.ReLU
    assert block.relu.inplace


def test_an_activation_that_takes_a_sum_too_stays():
    block, x = trained(Block(shortcut=True)), images()
    twin = copy.deepcopy(block)
    result = convert(block, to="batchnorm", fuse=True)
    assert result.fused == {}
    assert type(block.norm1) is batchnorm.BatchNorm2d
    assert "takes other outputs too" in result.unfused["norm1"]
    assert type(block.relu) is nn.ReLU
    torch.testing.assert_close(block(x), twin(x))


class Scrambled(nn.Module):
    """Registered as conv, norm, act; computed as conv, act, norm, function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return torch.relu(self.norm(self.act(self.conv(x))))


class Forked(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.norm, self.act, self.other, self.form = nn.BatchNorm2d(3), nn.ReLU(), nn.SiLU(), form

    def forward(self, x):
        y = self.norm(x)
        if self.form == "sum":
            return self.act(y) + y
        if self.form == "returned":
            return self.act(y), y
        if self.form == "two activations":
            return self.act(y) + self.other(self.norm(x))
        return self.act(y) if self.training else y


class Switch(nn.Module):
    """Of several norms one at a time, before the same activation."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.act, self.task = nn.ReLU(), 0

    def forward(self, x):
        return self.act(self.norms[self.task](x))


def hooked(which):
    model = chain(nn.BatchNorm2d(3), nn.ReLU())
    model[which].register_forward_hook(lambda m, i, y: None)
    return model


LEFT = {
    "a function": (Scrambled, "relu takes its output, which is no module"),
    "a sum": (lambda: Forked("sum"), "several operations"),
    "what is returned": (lambda: Forked("returned"), "several operations"),
    "two activations": (lambda: Forked("two activations"), "different activations"),
    "one mode": (lambda: Forked("in training"), "no module"),
    "a switch": (Switch, "calls at other times"),
    "a domain": (
        lambda: chain(DomainBatchNorm(batchnorm.BatchNorm2d(3), ["a", "b"]), nn.ReLU()),
        "",
    ),
    "hooks": (lambda: hooked(0), "it has hooks"),
    "an activation's hooks": (lambda: hooked(1), "1 has hooks"),
    "no known activation": (lambda: chain(nn.BatchNorm2d(3), nn.Softplus()), "Softplus follows it"),
    "a subclass": (
        lambda: chain(nn.BatchNorm2d(3), type("Mine", (nn.ReLU,), {})()),
        "",  # torch.fx goes through it, a pass does not
    ),
    "dropout": (lambda: chain(nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU()), "Dropout follows it"),
    "a threshold": (lambda: chain(nn.BatchNorm2d(3), nn.ReLU6()), "ReLU6 follows it"),
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", LEFT)
def test_an_activation_that_takes_or_means_more_stays_and_the_result_says_why(name, traced):
    make, reason = LEFT[name]
    model = make()
    whole = model if traced else Undecided(model)
    activations = [m for m in model.modules() if not any(m.children())]
    kinds = [type(m) for m in activations if not isinstance(m, nn.BatchNorm2d)]
    with batchnorm.domain("a"):
        result = convert(whole, to="batchnorm", fuse=True, example=images())
    assert result.fused == {}
    assert result.unfused
    assert reason in next(iter(result.unfused.values()))
    after = [type(m) for m in activations if not isinstance(m, nn.BatchNorm2d)]
    assert after == kinds


def test_a_norm_that_is_called_twice_takes_over_both_its_activations():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.second(self.norm(self.first(self.norm(x))))

    model, x = Twice(), images()
    twin = copy.deepcopy(model)
    assert convert(model, to="batchnorm", fuse=True).fused == {"norm": "relu"}
    assert [type(model.first), type(model.second)] == [nn.Identity] * 2
    torch.testing.assert_close(model(x), twin(x))
    convert(model, to="original")
    assert [type(model.first), type(model.second)] == [nn.ReLU] * 2


def test_a_policy_and_activations_are_taken_at_once_and_later_policies_keep_the_activation():
    model, x = trained(Block()), images()
    twin = copy.deepcopy(model)
    convert(model, to=Ghost(2), fuse=True)
    assert (model.norm1.statistics, str(model.norm1.act)) == (Ghost(2), "relu")
    convert(model, to=Ghost(4))
    assert (model.norm1.statistics, str(model.norm1.act)) == (Ghost(4), "relu")
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    convert(model, to="sync")
    assert (model.norm1.statistics, str(model.norm1.act)) == (Sync(), "relu")
    assert convert(model, to="torch_sync").skipped == {}
    assert (type(model.norm1), type(model.relu)) == (nn.SyncBatchNorm, nn.ReLU)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("to", ["torch", "original", "group_norm"])
def test_an_activation_is_given_back_by_all_of_its_norms_or_none(to):
    model = Block()
    convert(model, to="batchnorm", fuse=True)
    result = convert(model, to=to, where="norm1")
    assert list(result.skipped) == ["norm1"]
    assert type(model.relu) is nn.Identity
    assert str(model.norm1.act) == "relu"
    assert convert(model, to=to).skipped == {}
    assert type(model.relu) is nn.ReLU
    model = Block()
    convert(model, to="batchnorm", fuse=True)
    model.norm2.freeze()
    result = convert(model, to="torch")
    assert set(result.skipped) == {"norm1", "norm2"}
    assert type(model.relu) is nn.Identity
    assert type(model.norm1) is batchnorm.BatchNorm2d


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_copies_give_their_own_activations_back(again):
    model, x = trained(Block()), images()
    expected = copy.deepcopy(model).eval()(x)
    convert(model, to="batchnorm", fuse=True)
    twin = again(model)
    convert(twin, to="torch")
    assert type(twin.relu) is nn.ReLU
    assert type(model.relu) is nn.Identity
    torch.testing.assert_close(twin.eval()(x), expected)


def test_a_model_whose_order_nobody_can_read_is_refused_with_the_fix_and_left_as_it_was():
    model = Undecided(Block())
    with pytest.raises(ValueError, match=r"neither by torch.fx nor .* pass example="):
        convert(model, to="batchnorm", fuse=True)
    assert type(model.model.norm1) is nn.BatchNorm2d

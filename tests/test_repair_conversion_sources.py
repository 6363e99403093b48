"""What is converted: SyncBatchNorm, frozen, lazy and half-precision layers, subclasses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import Batch, DomainBatchNorm, Ghost, Renorm, Running
from batchnorm.layers.adoption import adopt
from batchnorm.repair.conversion import convert
from test_repair_conversion import LAZY, OURS, TORCH, batch, everything, images, network, tried


def test_a_sync_layer_takes_its_dimensions_from_what_it_was_or_an_example_and_else_asks():
    def synced():
        return nn.SyncBatchNorm.convert_sync_batchnorm(network())

    with pytest.raises(ValueError, match=r"SyncBatchNorm does not tell .* pass example="):
        convert(model := synced(), to="torch")
    assert [type(model[i]) for i in (1, 4, 7)] == [nn.SyncBatchNorm] * 3
    result = convert(model, to="torch", example=images())
    assert [type(model[i]) for i in (1, 4, 7)] == [type(network()[i]) for i in (1, 4, 7)]
    assert result.difference == 0
    unused = nn.ModuleDict({"used": synced(), "unused": nn.SyncBatchNorm(3)})
    result = convert(
        unused, to="batchnorm", example=images(), forward=lambda model, x: model["used"](x)
    )
    assert list(result.converted) == ["used.1", "used.4", "used.7"]
    assert "the example does not call it" in result.skipped["unused"]
    several = nn.SyncBatchNorm(3)
    both = lambda m, x: (m(x), m(x[:, :, 0]))  # noqa: E731
    result = convert(several, to="torch", example=torch.randn(2, 3, 4, 4), forward=both)
    assert "has inputs of several" in result.skipped[""]


def test_a_process_group_is_kept_and_can_be_given():
    model, group = network(), object()
    convert(model, to="torch_sync", process_group=group)
    assert model[1].process_group is group
    assert "is none that this process is in" in convert(model, to="batchnorm").skipped["1"]
    assert "is none that this process is in" in convert(model, to="sync").skipped["1"]
    model[1].process_group = model[4].process_group = model[7].process_group = None
    convert(model, to="batchnorm")
    assert not hasattr(model[1], "process_group")
    native = nn.SyncBatchNorm(3, process_group=group)
    convert(native, to=Batch(), example=batch(2))
    convert(native, to="torch_sync")
    assert native.process_group is group
    assert vars(native).keys() == vars(nn.SyncBatchNorm(3)).keys()


# Policies and frozen layers


def test_a_policy_that_a_layer_cannot_hold_is_refused_with_the_reason():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    result = convert(model, to=Renorm())
    assert "reads running statistics, and this layer has none" in result.skipped["0"]
    assert type(model[0]) is nn.BatchNorm2d
    assert model[1].statistics == Renorm()


def test_a_frozen_layer_is_not_thawed_in_passing():
    model = nn.Sequential(batchnorm.BatchNorm2d(3).freeze())
    for to in ("torch", "sync", Ghost(2)):
        result = convert(model, to=to)
        assert "it is frozen" in result.skipped["0"]
        assert "unfreeze() it" in result.skipped["0"]
        assert model[0].statistics == Running()
    model[0].unfreeze()
    convert(model, to="torch")
    assert type(model[0]) is nn.BatchNorm2d


def test_what_torch_has_no_place_for_is_told():
    model = nn.Sequential(batchnorm.BatchNorm2d(3, statistics=Ghost(2)))
    assert convert(model, to="torch").lost == {"0": "statistics=Ghost(size=2)"}
    convert(model, to="batchnorm")
    assert model[0].statistics == Ghost(2)
    model = nn.Sequential(batchnorm.BatchNorm2d(3, act="relu"))
    assert "its activation relu has no place" in convert(model, to="torch").skipped["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_are_wide_here_and_as_wide_as_the_weight_in_torch(dtype):
    norm = tried(nn.BatchNorm2d(3), 2).to(dtype)
    before = norm.running_var.clone()
    convert(norm, to="batchnorm")
    assert norm.running_var.dtype == torch.float32
    assert convert(norm, to="torch").lost == {}
    assert norm.running_var.dtype == dtype
    assert torch.equal(norm.running_var, before)
    ours = tried(batchnorm.BatchNorm2d(3), 2).to(dtype)
    x = batch(2).to(dtype)
    expected = ours(x)
    assert "rounded" in convert(ours, to="torch").lost[""]
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0.03)


def test_the_layers_of_a_domain_norm_take_policies_and_nothing_else():
    model = DomainBatchNorm(batchnorm.BatchNorm2d(3), ["a", "b"])
    result = convert(model, to="torch")
    assert all("DomainBatchNorm" in reason for reason in result.skipped.values())
    convert(model, to=Ghost(2))
    assert [layer.statistics for layer in model.layers.values()] == [Ghost(2), Ghost(2)]
    assert model(batch(2), domain="b").shape == (4, 3, 3, 3)


# Subclasses


class Settings(nn.BatchNorm2d):
    """As many projects have it: other defaults."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01, eps=1e-3)
        self.used_by = "me"


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Counted(nn.BatchNorm2d):
    def count(self):
        return 1


class Anything(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass


def test_a_subclass_with_other_defaults_is_converted_and_comes_back():
    norm = Settings(3)
    convert(norm, to=Ghost(2))
    assert type(norm) is batchnorm.BatchNorm2d
    assert (norm.eps, norm.momentum, norm.used_by) == (1e-3, 0.01, "me")
    convert(norm, to="original")
    assert type(norm) is Settings
    assert vars(norm).keys() == vars(Settings(3)).keys()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Doubled, "lost: forward"), (Counted, "lost: count"), (Anything, "derived from no class")],
)
@pytest.mark.parametrize("to", ["batchnorm", "sync", "group_norm", Ghost(2)])
def test_a_subclass_that_does_more_is_left_as_it_is_and_listed(kind, reason, to):
    model = nn.Sequential(kind(4), nn.BatchNorm2d(4))
    result = convert(model, to=to)
    assert type(model[0]) is kind
    assert reason in result.skipped["0"]
    assert list(result.converted) == ["1"]
    assert reason in repr(result)


# Lazy layers


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_lazy_layer_becomes_a_lazy_layer_and_knows_its_channels_later(dims):
    model = nn.Sequential(LAZY[dims](eps=1e-3))
    convert(model, to=Ghost(2))
    assert type(model[0]).__name__ == f"LazyBatchNorm{dims}d"
    x = batch(dims, channels=5)
    written = OURS[dims](5, eps=1e-3, statistics=Ghost(2))
    assert torch.equal(model(x), written(x))
    assert type(model[0]) is OURS[dims]
    assert model[0].num_features == 5
    convert(model, to="original")
    assert type(model[0]) is TORCH[dims]
    assert vars(model[0]).keys() == vars(TORCH[dims](5)).keys()


def test_a_lazy_layer_comes_back_before_its_first_batch_too():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    keys = vars(model[0]).keys()
    convert(model, to="batchnorm", example=torch.randn(2, 3, 4, 4))
    assert type(model[0]) is batchnorm.LazyBatchNorm2d
    convert(model, to="torch")
    assert type(model[0]) is nn.LazyBatchNorm2d
    assert vars(model[0]).keys() == keys
    assert model(batch(2)).shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    "to", ["torch_sync", "group_norm", "instance_norm", "layer_norm", "rms_norm", "identity"]
)
def test_a_lazy_layer_is_not_made_one_of_no_channels(to):
    model = nn.Sequential(nn.LazyBatchNorm2d())
    result = convert(model, to=to)
    assert "run one first" in result.skipped["0"]
    assert type(model[0]) is nn.LazyBatchNorm2d


def test_a_policy_that_stands_still_is_given_up_on_the_way_back_alone():
    norm = nn.BatchNorm2d(3)
    before = everything(norm)
    convert(norm, to=Running())
    assert convert(norm, to="torch").lost == {"": "statistics=Running()"}
    assert everything(norm) == before
    norm = batchnorm.BatchNorm2d(3, statistics=Running())
    assert "keeps what torch.nn.BatchNorm2d would move" in convert(norm, to="torch").skipped[""]


@pytest.mark.parametrize("to", ["torch", "original"])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_that_the_model_has_since_is_kept(to, kind):
    norm, x = nn.BatchNorm2d(3).bfloat16(), batch(2)
    convert(norm, to="batchnorm")
    norm.to(kind)
    convert(norm, to=to)
    assert norm(x.to(kind)).dtype == kind
    assert norm.running_mean.dtype == kind
    norm = nn.BatchNorm2d(3)
    result = convert(norm, to="batchnorm")
    norm.to(kind)
    result.undo()
    assert norm(x.to(kind)).dtype == kind


def test_undoing_thaws_a_layer_that_was_frozen_since():
    norm = nn.BatchNorm2d(3)
    before = everything(norm)
    result = convert(norm, to="batchnorm")
    norm.freeze()
    assert "unfreeze() it first" in convert(norm, to="original").skipped[""]
    result.undo()
    assert everything(norm) == before


def test_another_process_group_is_given_back_too():
    one, two = object(), object()
    norm = nn.SyncBatchNorm(3, process_group=one)
    convert(norm, to="torch_sync", process_group=two)
    assert norm.process_group is two
    convert(norm, to="original")
    assert norm.process_group is one


def test_a_layer_with_a_forward_of_its_own_is_left_as_it_is():
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: x
    assert "forward of its own" in convert(norm, to="batchnorm").skipped[""]
    assert type(norm) is nn.BatchNorm2d


def test_what_freeze_has_adopted_is_torchs_by_birth():
    norm = nn.BatchNorm2d(3).bfloat16()
    keys = vars(norm).keys() | set()
    adopt(norm)
    convert(norm, to=Ghost(2))
    convert(norm, to="original")
    assert type(norm) is nn.BatchNorm2d
    assert vars(norm).keys() == keys
    assert norm.running_mean.dtype == torch.bfloat16

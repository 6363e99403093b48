"""Folding by the graph: what goes, what stays and why, and that nothing else changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pytorchcv.models.densenet import DenseNet
from pytorchcv.models.mobilenetv2 import MobileNetV2
from pytorchcv.models.resnet import ResNet
from pytorchcv.models.vgg import VGG
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from batchnorm import BatchNorm1d, BatchNorm2d, DomainBatchNorm, domain
from batchnorm.repair.folding import fold
from batchnorm.repair.folding.folded import FoldedBatchNorm
from test_repair_folding_affine import randomized

NORMS = nn.modules.batchnorm._BatchNorm


def conv(i=3, o=4, k=3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def images(n=2, c=3, size=8) -> torch.Tensor:
    return torch.randn(n, c, size, size)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def fingerprint(model: nn.Module) -> list[object]:
    """All that a model is: modules, tensors and their values, modes, hooks."""
    found: list[object] = []
    for path, module in model.named_modules():
        found += [path, id(module), type(module), module.training, sorted(vars(module))]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found += [name, id(tensor), None if tensor is None else tensor.detach().tolist()]
        found += [len(module._forward_hooks), len(module._forward_pre_hooks)]
    return found


def folded(model: nn.Module, x, expected: dict[str, tuple[str, ...]], **options):
    """Fold, and check what went and that the answers are the same."""
    model = randomized(model)
    before = model(x.clone())
    result = fold(model, x, repeats=0, **options)
    assert result.folded == expected
    after = model(x.clone())
    assert relative(after, before) < 1e-5
    assert result.difference == pytest.approx(relative(after, before), abs=1e-6)
    return result


def stays(model: nn.Module, x, why: str, path: str = "norm", **options):
    """Fold, and check that one norm stays, with a reason, and the answers too."""
    model = randomized(model)
    before = model(x.clone())
    result = fold(model, x, repeats=0, **options)
    assert why in result.refused[path]
    assert isinstance(model.get_submodule(path), NORMS) or hasattr(
        model.get_submodule(path), "running_mean"
    )
    assert relative(model(x.clone()), before) < 1e-5
    return result


class Net(nn.Module):
    """Modules by name, and what is computed with them."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


class Undecided(nn.Module):
    """Control flow that no tracer follows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() > -1e9 else x


# Networks


def ended(network: nn.Module) -> nn.Module:
    """For images of any size."""
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return network


def resnet() -> nn.Module:
    channels = [[8, 8], [12, 12]]
    return ended(ResNet(channels, 8, bottleneck=False, conv1_stride=True, num_classes=5))


def mobilenet() -> nn.Module:
    channels = [[[8], [12, 12]], [[16, 16]]]
    return ended(MobileNetV2([c for s in channels for c in s], 8, 32, False, num_classes=5))


def vgg() -> nn.Module:
    network = VGG([[8], [12], [16, 16]], use_bn=True, num_classes=5)
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    network.output = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    return network


def densenet() -> nn.Module:
    return ended(DenseNet([[12, 16, 20], [14, 18]], 8, num_classes=5))


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
@pytest.mark.parametrize("make", [resnet, mobilenet, vgg])
def test_a_network_folds_completely(make, wrap):
    model, x = randomized(wrap(make())), images(size=32)
    norms = [path for path, m in model.named_modules() if isinstance(m, NORMS)]
    expected = model(x)
    result = fold(model, x, repeats=0)
    assert sorted(result.folded) == sorted(norms)
    assert result.refused == {}
    assert result.difference < 1e-5
    assert relative(model(x), expected) < 1e-5
    assert not any(isinstance(m, NORMS) for m in model.modules())
    fresh = images(n=3, size=40)
    assert relative(model(fresh), (result.undo(), model(fresh))[1]) < 1e-5


def test_of_a_densenet_the_norms_before_an_activation_on_a_concatenation_stay():
    model, x = randomized(densenet()), images(size=32)
    expected = model(x)
    result = fold(model, x, repeats=0)
    assert relative(model(x), expected) < 1e-5
    units = [f"features.stage{s}.unit{u}" for s, n in ((1, 3), (2, 2)) for u in range(1, n + 1)]
    behind = {f"{unit}.conv2.bn": (f"{unit}.conv1.conv",) for unit in units}
    assert result.folded == {"features.init_block.bn": ("features.init_block.conv",), **behind}
    assert set(result.refused) == {
        *(f"{unit}.conv1.bn" for unit in units),
        "features.stage2.trans2.conv.bn",
        "features.post_activ.bn",
    }
    assert all("and it feeds" in reason for reason in result.refused.values())
    assert "it follows cat" in result.refused["features.stage1.unit2.conv1.bn"]


# What the peers get wrong


def test_a_convolution_that_is_called_for_two_norms_stays_where_torch_is_wrong():
    # pytorch/pytorch#104593
    model = randomized(
        Net(
            lambda m, x: m.two(m.conv(m.one(m.conv(x)).relu())),
            conv=conv(3, 3, padding=1), one=nn.BatchNorm2d(3), two=nn.BatchNorm2d(3),
        )
    )  # fmt: skip
    x = images()
    assert relative(fuse(copy.deepcopy(model))(x), model(x)) > 0.1
    for path in ("one", "two"):
        stays(copy.deepcopy(model), x, "conv before it is called for something else too", path)


def test_a_convolution_with_two_consumers_stays():
    model = Net(lambda m, x: m.norm(y := m.conv(x)) + y, conv=conv(), norm=nn.BatchNorm2d(4))
    stays(model, images(), "something else takes what conv before it gives")
    stays(Undecided(model), images(), "something else takes", "model.norm")


def test_a_linear_layer_takes_a_norm_without_affine_where_torch_raises():
    linear, norm = nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(linear.eval(), norm.eval())
    folded(nn.Sequential(linear, norm), torch.randn(3, 5), {"1": ("0",)})


class OwnConv(nn.Conv2d):
    """A subclass that computes as its base."""


class OwnNorm(nn.BatchNorm2d):
    """Likewise."""


def test_subclasses_fold_where_torch_skips_them():
    model = randomized(nn.Sequential(OwnConv(3, 4, 3), nn.BatchNorm2d(4)))
    assert any(isinstance(m, NORMS) for m in fuse(copy.deepcopy(model)).modules())
    folded(model, images(), {"1": ("0",)})
    folded(nn.Sequential(OwnConv(3, 4, 3), OwnNorm(4)), images(), {"1": ("0",)})


def test_the_order_of_registration_is_not_that_of_execution():
    # conv → relu → norm, registered conv, norm, relu
    model = Net(
        lambda m, x: m.norm(m.relu(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4), relu=nn.ReLU()
    )
    stays(model, images(), "it follows relu")
    by_registration = nn.Sequential(fuse_conv_bn_eval(model.conv, model.norm), nn.ReLU())
    assert relative(by_registration(images()), model(images())) > 0.1


def test_an_activation_between_and_pooling_behind_stay_as_in_torchcrepe():
    model = Net(
        lambda m, x: m.second(F.max_pool2d(m.norm(F.relu(m.first(F.pad(x, (1, 1, 1, 1))))), 2)),
        first=conv(), norm=nn.BatchNorm2d(4), second=conv(4, 2),
    )  # fmt: skip
    stays(model, images(), "it follows relu, and it feeds max_pool2d")


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
def test_an_addition_in_place_between_is_seen(wrap):
    def run(m, x):
        y = m.conv(x)
        y += 1
        return m.norm(y)

    model = wrap(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)))
    path = next(path for path, m in model.named_modules() if isinstance(m, NORMS))
    stays(model, images(), "it follows", path)


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
def test_an_addition_in_place_whose_result_nobody_names_is_seen(wrap):
    def run(m, x):
        y = m.conv(x)
        y.add_(1)
        return m.norm(y)

    model = wrap(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)))
    path = next(path for path, m in model.named_modules() if isinstance(m, NORMS))
    stays(model, images(), "", path)


# Before a convolution


@pytest.mark.parametrize("ours", [False, True])
def test_a_norm_before_a_convolution_that_pads_with_zeros_stays(ours):
    norm = (BatchNorm2d if ours else nn.BatchNorm2d)(3)
    stays(Net(lambda m, x: m.conv(m.norm(x)), norm=norm, conv=conv(padding=1)), images(), "pads")


@pytest.mark.parametrize(
    "options",
    [{"padding": 1, "padding_mode": m} for m in ("reflect", "replicate", "circular")]
    + [{}, {"padding": "valid"}, {"stride": 2, "dilation": 2}, {"k": 1, "padding": "same"}],
)
def test_a_norm_before_a_convolution_goes_where_the_border_stays(options):
    model = nn.Sequential(nn.BatchNorm2d(3), conv(**options))
    folded(model, images(), {"0": ("1",)})


def test_same_padding_pads():
    stays(nn.Sequential(nn.BatchNorm2d(3), conv(padding="same")), images(), "pads", "0")


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ({"kernel_size": 1}, True),
        ({"kernel_size": 1, "stride": 2}, False),
        ({"kernel_size": 1, "padding": 1}, False),
        ({"kernel_size": 2, "stride": 2}, False),  # no overlap, and yet another at each offset
        ({"kernel_size": 3}, False),
    ],
)
def test_a_norm_before_a_transposed_convolution(options, goes):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, groups=2, **options))
    if goes:
        folded(model, images(c=4), {"0": ("1",)})
    else:
        stays(model, images(c=4), "1 behind it", "0")


def test_a_norm_without_a_shift_goes_into_anything_behind_it():
    for behind in (conv(padding=1), nn.ConvTranspose2d(3, 4, 3, 2, 1, 1)):
        model = randomized(nn.Sequential(nn.BatchNorm2d(3, bias=False), behind))
        model[0].running_mean.zero_()
        x = images()
        expected = model(x)
        assert fold(model, x, repeats=0).folded == {"0": ("1",)}
        torch.testing.assert_close(model(x), expected)


def test_a_norm_goes_into_all_that_take_its_output_or_none():
    def run(m, x):
        y = m.norm(x)
        return m.one(y) + m.two(y)

    model = Net(run, norm=nn.BatchNorm2d(3), one=conv(), two=conv())
    folded(copy.deepcopy(model), images(), {"norm": ("one", "two")})
    model.two.padding, model.one.padding = (1, 1), (0, 0)
    model.run = lambda m, x: m.one(y := m.norm(x)).sum() + m.two(y)
    stays(model, images(), "two behind it pads")


def test_a_shared_convolution_behind_one_norm_of_two_calls_stays():
    model = Net(lambda m, x: m.conv(m.norm(x)) + m.conv(x), norm=nn.BatchNorm2d(3), conv=conv())
    stays(model, images(), "conv behind it is called for something else too")


@pytest.mark.parametrize("flatten", [nn.Flatten(), None])
def test_flattened_channels_are_features(flatten):
    flat = flatten or (lambda x: torch.flatten(x, 1))
    model = Net(
        lambda m, x: m.linear(m.drop(flat(m.norm(x)))),
        norm=nn.BatchNorm2d(3), drop=nn.Dropout(0.5), linear=nn.Linear(12, 5),
        **({} if flatten is None else {"flatten": flatten}),
    )  # fmt: skip
    folded(model, images(size=2), {"norm": ("linear",)})


def test_flattened_channels_are_features_in_one_pass_too():
    model = Undecided(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12),
                                    nn.Linear(12, 5)))  # fmt: skip
    folded(model, images(size=2), {"model.2": ("model.3",), "model.0": ("model.3",)})


# Chains, sharing, and what passes


def test_chains_fold_until_nothing_is_left():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), conv(), nn.Identity(), nn.BatchNorm2d(4),
        nn.Dropout2d(0.5), BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip
    into = ("2",)
    folded(model, images(), {"4": into, "6": into, "1": into, "0": into})
    assert isinstance(model[6], FoldedBatchNorm)


def test_a_norm_behind_several_convolutions_goes_into_each():
    def run(m, x):
        return m.norm(m.one(x)) + m.norm(m.two(x))

    model = Net(run, one=conv(), two=conv(bias=False), norm=nn.BatchNorm2d(4))
    folded(model, images(), {"norm": ("one", "two")})


def test_a_block_that_is_called_again_folds():
    block = nn.Sequential(conv(3, 3, padding=1), nn.BatchNorm2d(3))
    folded(Net(lambda m, x: m.block(m.block(x)), block=block), images(), {"block.1": ("block.0",)})


def test_asking_for_a_shape_is_no_use_of_values():
    def run(m, x):
        y = m.conv(x)
        return m.norm(y) * y.shape[1] / y.size(0)

    folded(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)), images(), {"norm": ("conv",)})


def test_functional_dropout_in_eval_mode_passes():
    model = Net(
        lambda m, x: m.norm(F.dropout(m.conv(x), 0.5, training=m.training)),
        conv=conv(), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    folded(model, images(), {"norm": ("conv",)})


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
@pytest.mark.parametrize("keep", ["y", "[y]", "{'y': y}"])
def test_what_a_model_keeps_for_others_to_read_stays(wrap, keep):
    def run(m, x):
        y = m.conv(x)
        m.kept = eval(keep)  # noqa: S307 - ours
        return m.norm(y)

    model = wrap(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)))
    path = next(path for path, m in model.named_modules() if isinstance(m, NORMS))
    stays(model, images(), "something else takes what", path)


def test_an_argument_that_is_not_given_is_not_traced():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x, mask=None, *, scale=1.0):
            y = self.conv(x)
            return self.norm(y if mask is None else y * mask) * scale

    folded(Masked(), images(), {"norm": ("conv",)})


# This library's layers, and others'


@pytest.mark.parametrize("act", [None, "relu", nn.LeakyReLU(0.2)])
def test_what_is_fused_into_a_layer_stays(act):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(4, 4, padding=1), BatchNorm2d(4, act=act)
            self.last = BatchNorm2d(4)

        def forward(self, x):
            mask = torch.arange(8 * 8).view(1, 8, 8).expand(2, 8, 8) % 3 > 0
            return self.last(self.norm(self.conv(x), residual=x, mask=mask))

    model = Block()
    folded(model, images(c=4), {"norm": ("conv",)})
    assert repr(model.norm) == f"FoldedBatchNorm(4, act={model.norm.act})"
    with torch.no_grad():
        assert (model.norm(images(c=4), mask=torch.zeros(2, 8, 8, dtype=torch.bool)) == 0).all()


def test_an_activation_that_is_fused_keeps_a_norm_from_going_into_what_is_behind():
    model = Net(lambda m, x: m.conv(m.norm(x)), norm=BatchNorm2d(3, act="relu"), conv=conv())
    stays(model, images(), "it follows no layer, and it ends in more than the normalization")


def test_a_residual_that_is_the_convolution_itself_stays():
    model = Net(lambda m, x: m.norm(y := m.conv(x), residual=y), conv=conv(), norm=BatchNorm2d(4))
    stays(model, images(), "something else takes")
    stays(Undecided(model), images(), "something else takes", "model.norm")


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
def test_a_convolution_that_gives_the_residual_too_stays(wrap):
    model = wrap(
        Net(
            lambda m, x: m.norm(m.conv(x), residual=m.conv(2 * x)),
            conv=conv(), norm=BatchNorm2d(4),
        )
    )  # fmt: skip
    path = next(path for path, m in model.named_modules() if isinstance(m, NORMS))
    stays(model, images(), "conv before it is called for something else too", path)


def test_a_norm_with_a_residual_does_not_go_into_what_is_behind():
    model = Net(lambda m, x: m.conv(m.norm(x, residual=x)), norm=BatchNorm2d(3), conv=conv())
    stays(model, images(), "it is given more than its input")


def test_synchronized_norms_fold():
    folded(nn.Sequential(conv(), nn.SyncBatchNorm(4)), images(), {"1": ("0",)})


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: four buffers, and no batch norm to isinstance."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        w, b = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        rm, rv = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class Halved(FrozenBatchNorm2d):
    """The same buffers, and something else computed with them."""

    def forward(self, x):
        return super().forward(x) / 2


def test_others_frozen_norms_fold():
    folded(nn.Sequential(conv(), FrozenBatchNorm2d(4)), images(), {"1": ("0",)})
    stays(nn.Sequential(conv(), Halved(4)), images(), "computes something else", "1")


class Constants(nn.Module):
    """As `FrozenBatchNorm2d`, under a name that does not tell, with an activation as timm's."""

    forward_of = FrozenBatchNorm2d.forward

    def __init__(self, channels: int) -> None:
        super().__init__()
        vars(self).update(vars(FrozenBatchNorm2d(channels)))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.forward_of(x))


def test_frozen_norms_are_known_by_what_they_hold():
    folded(nn.Sequential(conv(), Constants(4)), images(), {"1": ("0",)})
    silent = nn.Sequential(conv(), FrozenBatchNorm2d(4), conv(4, 4), FrozenBatchNorm2d(4))
    silent[1].eps, silent[1].forward = None, lambda x: 2 * x
    stays(silent, images(), "does not tell its eps", "1")


class WithAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class WithoutModule(nn.BatchNorm2d):
    """An activation that no submodule tells of."""

    def forward(self, x):
        return F.relu(super().forward(x))


def test_norms_with_an_activation_of_their_own_keep_it():
    model = nn.Sequential(conv(), WithAct(4, nn.Hardtanh(-0.5, 0.5)))
    act = model[1].act
    folded(model, images(), {"1": ("0",)})
    assert model[1][1] is act
    own = randomized(nn.Sequential(conv(), WithoutModule(4)))
    own[1].bias.data.fill_(50)  # which the example alone would not tell: nothing is below zero
    assert "computes something else" in fold(own, images(), repeats=0).refused["1"]


class Standardized(nn.Conv2d):
    """Weight standardization: a weight's scale does nothing."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """Padding by the input's size."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class NoBias(nn.Conv2d):
    """A bias that is not looked at."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


def test_convolutions_with_a_forward_of_their_own_are_tried():
    folded(nn.Sequential(Same(3, 4, 3), nn.BatchNorm2d(4)), images(), {"1": ("0",)})
    folded(nn.Sequential(Same(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images(), {"1": ("0",)})
    for kind in (Standardized, NoBias):
        model = nn.Sequential(kind(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        stays(model, images(), "0: it computes with its weight in another way", "1")
    before = nn.Sequential(nn.BatchNorm2d(3), Same(3, 4, 3))
    stays(before, images(), "1 behind it has a forward of its own", "0")


# What stays


def test_channels_along_another_dimension_stay():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    stays(model, torch.randn(2, 7, 5), "0 has its channels along another dimension", "1")
    unbatched = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6))
    stays(unbatched, torch.randn(3, 6), "another dimension", "1")
    behind = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 4))
    stays(behind, torch.randn(2, 7, 7), "another dimension", "0")


def tied() -> nn.Module:
    model = nn.Sequential(conv(4, 4, padding=1), nn.BatchNorm2d(4), conv(4, 4, padding=1))
    model[2].weight = model[0].weight
    return model


def hooked(at: str) -> nn.Module:
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(4, 4), norm=nn.BatchNorm2d(4))
    model.get_submodule(at).register_forward_hook(lambda m, i, y: None)
    return model


def taken(what: str) -> nn.Module:
    def run(m, x):
        return m.norm(m.conv(x)) * m.get_parameter(what).sum()

    return Net(run, conv=conv(4, 4), norm=nn.BatchNorm2d(4))


def parametrized(change) -> nn.Module:
    return nn.Sequential(change(conv(4, 4)), nn.BatchNorm2d(4))


STAYS = {
    "tied weights": (tied, "0: its weight is used elsewhere too", "1"),
    "a hooked convolution": (lambda: hooked("conv"), "conv: it has hooks", "norm"),
    "a hooked norm": (lambda: hooked("norm"), "it has hooks", "norm"),
    "a weight in use": (lambda: taken("conv.weight"), "conv: its weight is used elsewhere", "norm"),
    "a γ in use": (lambda: taken("norm.weight"), "computes with its weight itself", "norm"),
    "a parametrized weight": (
        lambda: parametrized(nn.utils.parametrizations.weight_norm),
        "0: its weight is computed",
        "1",
    ),
    "a spectral norm": (
        lambda: parametrized(nn.utils.parametrizations.spectral_norm),
        "0: its weight is computed",
        "1",
    ),
    "no running statistics": (
        lambda: nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        "it keeps no running statistics",
        "1",
    ),
    "the model itself": (lambda: nn.BatchNorm2d(4), "it is the model itself", ""),
    "what is not called": (
        lambda: Net(lambda m, x: m.conv(x), conv=conv(4, 4), norm=nn.BatchNorm2d(4)),
        "no call of it was seen",
        "norm",
    ),
}


@pytest.mark.parametrize("wrap", [lambda m: m, Undecided], ids=["traced", "one pass"])
@pytest.mark.parametrize("case", STAYS)
def test_what_is_unsafe_stays(case, wrap):
    make, why, path = STAYS[case]
    model = wrap(make())
    if isinstance(model, Undecided):
        path = f"model.{path}".rstrip(".")
        why = why.replace("0: ", "model.0: ").replace("conv: ", "model.conv: ")
        if case == "the model itself":
            why = "it follows no layer"
    before = model.state_dict().keys()
    stays(model, images(c=4), why, path)
    assert model.state_dict().keys() == before


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes_stay():
    model = nn.Sequential(nn.utils.weight_norm(conv(4, 4)), nn.BatchNorm2d(4))
    stays(model, images(c=4), "0: its weight is computed", "1")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_broken_statistics_stay(value):
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.model(x).nan_to_num()

    model = randomized(Guarded())
    model.model[1].running_var[0] = value
    result = fold(model, images(), repeats=0)
    assert "not finite" in result.refused["model.1"]
    assert result.folded == {"model.3": ("model.2",)}


def test_an_answer_that_is_no_number_is_an_error():
    model = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="answers the example with NaN, before"):
        fold(model, images() * math.nan)


def test_an_answer_that_is_infinite_on_purpose_is_one_as_others():
    model = Net(
        lambda m, x: torch.where(x[:, :1, 1:-1, 1:-1] > 0, m.norm(m.conv(x)), -math.inf),
        conv=conv(), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    model, x = randomized(model), images()
    expected = model(x)
    assert fold(model, x, repeats=0).difference < 1e-5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_folded_in_inference_mode_can_be_trained():
    model, x = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4))), images()
    with torch.inference_mode():
        result = fold(model, x, repeats=0)
    assert result.folded == {"1": ("0",)}
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.is_leaf for p in model.parameters())


def test_weights_that_would_overflow_stay():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 2), nn.BatchNorm2d(2)).eval()
    model[1].running_var.fill_(2e-7)
    model[1].eps = 1e-12
    model = model.half()
    with torch.no_grad():
        model[0].weight.fill_(200)
        model[0].bias.zero_()
        model[2].weight.mul_(1e-2)
    x = images().half() * 1e-4
    expected = model(x)
    result = fold(model, x, repeats=0)
    assert result.folded == {"3": ("2",)}
    assert result.refused == {"1": "the weights of 0 would not be finite any more"}
    assert relative(model(x), expected) < 1e-2


def test_one_domain_stays():
    norm = DomainBatchNorm(BatchNorm2d(4), ["clean", "noisy"])
    model = randomized(nn.Sequential(conv(), norm))
    with domain("clean"):
        result = fold(model, images(), repeats=0)
    assert set(result.refused) == {"1.layers.clean", "1.layers.noisy"}
    assert "of one domain" in result.refused["1.layers.clean"]


# Modes


def test_a_model_in_training_mode_is_an_error():
    with pytest.raises(ValueError, match=r"'1' normalizes with the batch; call model.eval\(\)"):
        fold(nn.Sequential(conv(), nn.BatchNorm2d(4)), images())


def test_a_norm_in_training_mode_stays():
    model = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)))
    model[1].train()
    result = fold(model, images(), repeats=0)
    assert "in training mode" in result.refused["1"]
    assert result.folded == {"3": ("2",)}


def test_layers_that_are_frozen_fold_in_training_mode_and_dropout_draws_the_same():
    model = randomized(nn.Sequential(conv(), BatchNorm2d(4), nn.Dropout(0.5), conv(4, 4)))
    model[1].freeze()
    model.train()
    buffers = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    result = fold(model, images(), repeats=1)
    assert result.folded == {"1": ("0",)}
    assert result.difference < 1e-5
    assert model[1].training
    assert buffers.keys() > model.state_dict().keys()
    del random


# Arguments


def test_where_says_which():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4))
    result = folded(model, images(), {"3": ("2",)}, where="3")
    assert result.refused == {}
    with pytest.raises(ValueError, match="names none of the 1 batch norms, such as '1'"):
        fold(model, images(), where="backbone.*")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, image, scale):
        return {"y": self.norm(self.encoded(image)) * scale, "n": torch.tensor(3)}

    def encoded(self, image):
        return self.conv(image)

    def odd(self, image):
        return self.norm(self.conv(image)) + self.conv(image)


def test_batches_by_name_and_outputs_in_dictionaries():
    model = randomized(TwoInputs())
    batch = {"image": images(), "scale": torch.ones(1)}
    expected = model(**batch)["y"]
    assert fold(model, batch, repeats=0).folded == {"norm": ("conv",)}
    assert relative(model(**batch)["y"], expected) < 1e-5


def test_a_call_of_another_kind_is_read_as_it_is():
    model = randomized(TwoInputs())
    result = fold(model, images(), forward=lambda m, x: m.odd(x), repeats=0)
    assert "called for something else too" in result.refused["norm"]


def test_an_example_that_the_model_modifies_stays():
    model = randomized(nn.Sequential(nn.ReLU(inplace=True), conv(), nn.BatchNorm2d(4)))
    x = images()
    before = x.clone()
    assert fold(model, x, repeats=2).difference < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), {}, "its shape yet"),
        (lambda: nn.Sequential(conv(device="meta"), nn.BatchNorm2d(4)), {}, "meta device"),
        (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), {"tolerance": -1.0}, "tolerance"),
        (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), {"tolerance": math.nan}, "tolerance"),
        (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), {"repeats": -1}, "repeats"),
        (
            lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)),
            {"forward": lambda m, x: len(m(x))},
            "no tensors to compare",
        ),
    ],
)
def test_bad_input_is_said(make, options, message):
    with pytest.raises(ValueError, match=message):
        fold(make().eval(), images(), **options)


def test_a_model_without_batch_norms_is_left_alone():
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    before = fingerprint(model)
    result = fold(model, images())
    assert repr(result) == "Folding: 0 of 0 batch norms"
    assert (result.speedup, result.parameters_saved, result.difference) == (None, 0, 0.0)
    assert fingerprint(model) == before


# The result, and the way back


def test_what_the_result_tells():
    model = randomized(densenet())
    numbers = sum(p.numel() for p in model.parameters())
    result = fold(model, images(size=32), repeats=2)
    assert numbers - result.parameters_saved == sum(p.numel() for p in model.parameters())
    assert result.speedup == result.seconds_before / result.seconds_after > 0
    said = repr(result).splitlines()
    assert said[0].startswith("Folding: 6 of 13 batch norms, outputs differ by ")
    assert f"{result.parameters_saved:,} parameters fewer" in said[0]
    assert said[2].split() == ["features.init_block.bn", "features.init_block.conv"]
    assert "Not folded:" in said


def test_undo_gives_the_model_back():
    model, x = randomized(resnet()), images(size=32)
    before, expected = fingerprint(model), model(x)
    result = fold(model, x, repeats=1)
    assert fingerprint(model) != before
    result.undo()
    assert fingerprint(model) == before
    assert torch.equal(model(x), expected)
    result.undo()  # nothing to undo any more
    assert fingerprint(model) == before


def test_undo_refuses_where_later_changes_are():
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(4)))
    x, before = images(), fingerprint(model)
    first, second = fold(model, x, where="2"), fold(model, x, where="0")
    folded_twice = fingerprint(model)
    with pytest.raises(ValueError, match="undo later changes first"):
        first.undo()
    assert fingerprint(model) == folded_twice
    second.undo()
    first.undo()
    assert fingerprint(model) == before


class Remembers(nn.Module):
    """Holds its norm where no module is looked for."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv(), nn.BatchNorm2d(4))
        self.conv, self.norm = conv(4, 4), nn.BatchNorm2d(4)
        self.norms = [self.norm]

    def forward(self, x):
        return self.norms[0](self.conv(self.first(x)))


def test_answers_that_differ_are_an_error_that_names_the_layer_and_changes_nothing():
    model = randomized(Remembers())
    before = fingerprint(model)
    with pytest.raises(ArithmeticError, match=r"1e-05 is allowed; it begins at 'norm'") as error:
        fold(model, images())
    assert "differ by" in str(error.value)
    assert fingerprint(model) == before
    with pytest.raises(ArithmeticError, match="0 is allowed"):
        fold(randomized(resnet()), images(size=32), tolerance=0.0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_pass_changes_nothing(error):
    model, x = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4), Same(4, 4, 3))), images()
    model.append(WithAct(4, nn.ReLU()).eval())
    before, random = fingerprint(model), torch.get_rng_state()
    count, fails_at = 0, 0

    def forward(m, x):
        nonlocal count
        count += 1
        y = m(x)
        if count == fails_at:
            raise error("here")
        return y

    fold(model, x, forward=forward, repeats=2).undo()
    assert count == 9  # dimensions, calls, graph, before, after, and twice two to time
    for fails_at in range(1, 10):
        count = 0
        try:
            fold(model, x, forward=forward, repeats=2).undo()
            # the graph is then read in another way
            assert (fails_at, error) == (3, RuntimeError)
        except error:
            pass
        assert fingerprint(model) == before
        assert torch.equal(torch.get_rng_state(), random)


class Interrupted(dict):
    """Modules of which one cannot be replaced."""

    def __setitem__(self, name, module):
        if name == "3" and isinstance(module, nn.Identity):
            raise KeyboardInterrupt
        super().__setitem__(name, module)


def test_a_change_that_breaks_off_in_the_middle_is_undone():
    model = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)))
    model._modules = Interrupted(model._modules)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        fold(model, images())
    assert fingerprint(model) == before


# Others who look at models


def test_traced_and_compiled_models():
    traced = torch.fx.symbolic_trace(randomized(nn.Sequential(conv(), nn.BatchNorm2d(4))))
    folded(traced, images(), {"1": ("0",)})


@pytest.mark.as_installed
def test_a_compiled_model_folds_as_the_model_that_was_compiled():
    model, x = randomized(nn.Sequential(conv(), nn.BatchNorm2d(4))), images()
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    assert fold(compiled, x, repeats=0).folded == {"1": ("0",)}
    assert relative(compiled(x), expected) < 1e-5


@pytest.mark.as_installed
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # PyTorch's own
def test_a_folded_model_exports():
    model, x = randomized(nn.Sequential(conv(), BatchNorm2d(4, act="relu"), conv(4, 4))), images()
    fold(model, x, repeats=0)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_one_dimension_folds_by_ours():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), BatchNorm1d(4, act="silu"))
    folded(model, torch.randn(2, 3, 9), {"1": ("0",)})


@pytest.mark.parametrize("where", [None, ["one", "norm"]])
@pytest.mark.parametrize("other", [{}, {"track_running_stats": False}])
def test_another_way_through_the_model_keeps_its_norms_and_what_lies_beside_them(other, where):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.next, self.last = (nn.Conv2d(*c, 1) for c in ((3, 4), (4, 5), (5, 2)))
            self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4, **other)
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x):
            norm = self.one if x.sum() > 0 else self.other
            return self.norm(self.last(self.next(norm(self.conv(x)))))

    model = randomized(Branching())
    x = torch.rand(2, 3, 4, 4)
    expected = [model(x), model(-x)]
    result = fold(model, x, where=where, repeats=0)
    assert result.folded == {"norm": ("last",)}
    assert "norms that it calls at other times" in result.refused["one"]
    for given, answer in zip((x, -x), expected, strict=True):
        torch.testing.assert_close(model(given), answer)

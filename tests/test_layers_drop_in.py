"""Against torch.nn: the same numbers, the same errors, the same state."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import (
    ModuleErrorEnum,
    module_db,
)

import batchnorm
from strategies import LAYOUTS, lay_out

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
SHAPES = {
    "BatchNorm1d": [(2, 3), (16, 3), (2, 3, 1), (5, 3, 7)],
    "BatchNorm2d": [(2, 3, 1, 1), (1, 3, 4, 2), (6, 3, 4, 5)],
    "BatchNorm3d": [(2, 3, 1, 2, 1), (4, 3, 2, 3, 4)],
}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {}}


def pair(name, *args, **kwargs):
    """torch's layer and ours, with the same random γ and β."""
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(batchnorm, name)(*args, **kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same_state(ours, theirs, **tolerance):
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key, value in other.items():
        torch.testing.assert_close(mine[key], value, **tolerance)


def run(layer, x, layout, dtype):
    """Output and all gradients of one call."""
    leaf = x.to(dtype).requires_grad_()
    y = layer(lay_out(leaf, layout))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)


def compare(theirs, ours, x, layout="contiguous"):
    """Outputs, all gradients and the state after one call of each, and against float64.

    With two values a channel gradients are what rounding leaves of a difference; there the
    measure is that ours are no further from torch's in float64 than torch's in float32 are.
    """
    truth = run(copy.deepcopy(theirs).double(), x, layout, torch.float64)
    other, mine = (run(layer, x.detach().clone(), layout, x.dtype) for layer in (theirs, ours))
    for exact, a, b in zip(truth, other, mine, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            # in float64 the truth is rounded as well, and 1/√ε = 316 multiplies it
            units = 16 if x.dtype == torch.float32 else 4096
            rounding = units * torch.finfo(x.dtype).eps * (1 + exact.abs().max())
            assert (b - exact).abs().max() <= (a - exact).abs().max() + rounding
    assert_same_state(ours, theirs, **TOLERANCE[x.dtype])


CASES = [
    pytest.param(name, shape, dtype, momentum, affine, bias, tracked, id=f"{name}-{shape}-{i}")
    for i, (dtype, momentum, (affine, bias), tracked) in enumerate(
        itertools.product(
            (torch.float32, torch.float64),
            (0.1, 0.9, None, 0.0),
            ((True, True), (True, False), (False, True)),
            (True, False),
        )
    )
    for name in NAMES
    for shape in SHAPES[name]
]


@pytest.mark.parametrize(("name", "shape", "dtype", "momentum", "affine", "bias", "tracked"), CASES)
def test_three_steps_and_an_evaluation(name, shape, dtype, momentum, affine, bias, tracked):
    theirs, ours = pair(
        name,
        3,
        momentum=momentum,
        affine=affine,
        track_running_stats=tracked,
        dtype=dtype,
        bias=bias,
    )
    for step in range(3):
        compare(theirs, ours, torch.randn(shape, dtype=dtype) * (step + 1) + step)
    theirs.eval(), ours.eval()
    compare(theirs, ours, torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_layouts(name, layout, training):
    # equal samples have no variance, and their gradients in training are rounding alone
    layout = "contiguous" if training and layout == "expanded_batch" else layout
    theirs, ours = pair(name, 3)
    theirs.train(training), ours.train(training)
    for shape in SHAPES[name]:
        compare(theirs, ours, torch.randn(shape), layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_count_and_change_nothing(name, momentum, training):
    theirs, ours = pair(name, 3, momentum=momentum)
    theirs.train(training), ours.train(training)
    for shape in SHAPES[name]:
        compare(theirs, ours, torch.randn(0, *shape[1:]))
        if len(shape) > 2:
            compare(theirs, ours, torch.randn(*shape[:-1], 0))
        compare(theirs, ours, torch.randn(4, *shape[1:]))


def module_cases():
    for info in module_db:
        if info.module_cls in [getattr(nn, name) for name in NAMES]:
            for training in (True, False):
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
                )
                for case in inputs:
                    yield pytest.param(
                        info.module_cls.__name__, case, training,
                        id=f"{info.module_cls.__name__}-{case.desc}-{training}",
                    )  # fmt: skip


@pytest.mark.parametrize(("name", "case", "training"), list(module_cases()))
def test_pytorch_s_own_module_inputs(name, case, training):
    constructor = case.constructor_input
    theirs, ours = pair(name, *constructor.args, **{"dtype": torch.float64, **constructor.kwargs})
    theirs.train(training), ours.train(training)
    compare(theirs, ours, *case.forward_input.args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.as_installed
def test_pytorch_s_own_module_error_inputs(name):
    info = next(i for i in module_db if i.module_cls is getattr(nn, name))
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    assert cases
    for case in cases:
        constructor, call = case.module_error_input.constructor_input, case.module_error_input
        assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
        layer = getattr(batchnorm, name)(*constructor.args, **constructor.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*call.forward_input.args)
        assert layer.num_batches_tracked.item() == 0  # nothing half-written


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5, 6])
@pytest.mark.as_installed
def test_wrong_ranks_raise_what_torch_raises(name, ndim):
    theirs, ours = pair(name, 2)
    x = torch.randn((2,) * ndim)
    answers = []
    for layer in (theirs, ours):
        try:
            answers.append(layer(x).shape)
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", NAMES)
def test_eps_zero_is_accepted_in_eval_and_refused_in_training(name):
    theirs, ours = pair(name, 3, eps=0.0)
    theirs.eval(), ours.eval()
    compare(theirs, ours, torch.randn(SHAPES[name][-1]))
    for layer in (theirs, ours):
        with pytest.raises(ValueError, match="eps must be positive"):
            layer.train()(torch.randn(SHAPES[name][-1]))


@pytest.mark.parametrize("name", NAMES)
def test_constructor_arguments_by_position_and_attributes(name):
    args = (3, 1e-3, 0.3, True, True, "cpu", torch.float64)
    theirs, ours = pair(name, *args)
    for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert isinstance(ours, getattr(nn, name))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert repr(ours) == repr(theirs)
    assert ours(input=torch.randn(SHAPES[name][-1]).double()).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_state_dicts_load_both_ways(name, tracked, affine):
    theirs, ours = pair(name, 3, affine=affine, track_running_stats=tracked)
    ours(torch.randn(SHAPES[name][-1]))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    # checkpoints from before num_batches_tracked
    old = {k: v for k, v in ours.state_dict().items() if k != "num_batches_tracked"}
    fresh = getattr(batchnorm, name)(3, affine=affine, track_running_stats=tracked)
    fresh.load_state_dict(old, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_track_running_stats_changed_after_construction(name):
    theirs, ours = pair(name, 3)
    theirs.track_running_stats = ours.track_running_stats = False
    for training in (True, False):
        theirs.train(training), ours.train(training)
        compare(theirs, ours, torch.randn(SHAPES[name][-1]))


def test_one_value_per_channel_is_refused_in_training_and_where_nothing_is_tracked():
    theirs, ours = pair("BatchNorm1d", 3)
    untracked, ours_untracked = pair("BatchNorm1d", 3, track_running_stats=False)
    for layer in (theirs, ours, untracked.eval(), ours_untracked.eval()):
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ):
            layer(torch.randn(1, 3))
    assert ours.num_batches_tracked.item() == 0
    theirs, ours = pair("BatchNorm1d", 3)
    compare(theirs.eval(), ours.eval(), torch.randn(1, 3))


def test_deepcopy_and_pickle_keep_everything():
    layer = batchnorm.BatchNorm2d(3, act="silu", statistics=batchnorm.Ghost(2))
    layer(torch.randn(4, 3, 2, 2))
    x = torch.randn(4, 3, 2, 2)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert repr(copied) == repr(layer)
        assert_same_state(copied, layer)
        assert torch.equal(copied(x), copy.deepcopy(layer)(x))


def test_functional_call_and_parametrization():
    layer = batchnorm.BatchNorm1d(3).eval()
    x = torch.randn(4, 3)
    parameters = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    y = torch.func.functional_call(layer, parameters, (x,))
    torch.testing.assert_close(y, 2 * x / (1 + 1e-5) ** 0.5 + 1)


def test_timm_like_freezing_reads_the_same_attributes():
    """What freezing code in the wild copies from one layer to another."""
    source = batchnorm.BatchNorm2d(3, bias=False)
    target = nn.BatchNorm2d(
        source.num_features, source.eps, source.momentum, source.affine,
        source.track_running_stats, bias=source.bias is not None,
    )  # fmt: skip
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_state(target, source)


def test_gradients_of_other_layouts_and_large_n():
    theirs, ours = pair("BatchNorm1d", 2)
    compare(theirs, ours, torch.randn(70_000, 2))
    theirs, ours = pair("BatchNorm2d", 3)
    x = torch.randn(2, 3, 4, 5)
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        dy = lay_out(torch.arange(120.0).view(2, 3, 4, 5), "permuted")
        results.append(torch.autograd.grad(y, leaf, dy)[0])
    torch.testing.assert_close(*results)

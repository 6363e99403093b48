"""Conversions that lose nothing, the way back from each, and what stays as it is on the way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import Batch, Ghost, Renorm, Running
from batchnorm.layers import BatchNorm
from batchnorm.repair.accumulation import accumulate
from batchnorm.repair.adaptation import adapt
from batchnorm.repair.conversion import convert, work
from batchnorm.repair.freezing import freeze, unfreeze

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: batchnorm.BatchNorm1d, 2: batchnorm.BatchNorm2d, 3: batchnorm.BatchNorm3d}
LAZY = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}


def batch(dims, channels=3, n=4, dtype=torch.float32):
    return torch.randn(n, channels, *[3] * dims, dtype=dtype)


def tried(norm, dims):
    """A layer with numbers that differ everywhere."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(7)
    return norm


def everything(norm):
    """All that a round trip must leave as it was; tensors by identity and by their bytes."""
    tensors = {**norm._parameters, **norm._buffers}
    return {
        "class": type(norm),
        "attributes": {n: v for n, v in vars(norm).items() if n not in ("_parameters", "_buffers")},
        "keys": list(norm.state_dict()),
        "parameters": {name: id(p) for name, p in norm._parameters.items()},
        "grads": {name: p.requires_grad for name, p in norm.named_parameters()},
        "values": {
            n: None
            if t is None
            else (t.dtype, t.device, t.detach().reshape(-1).view(torch.uint8).tolist())
            for n, t in tensors.items()
        },
    }


def hooked(norm):
    norm.register_forward_hook(lambda m, i, y: None)
    norm.register_forward_pre_hook(lambda m, i: None)
    norm.register_full_backward_hook(lambda m, i, o: None)
    norm.register_state_dict_post_hook(lambda *a: None)
    norm.register_load_state_dict_post_hook(lambda *a: None)
    norm.note = {"mine": [1]}
    return norm


@st.composite
def norms(draw, kinds=(TORCH, OURS)):
    dims = draw(st.integers(1, 3))
    affine, tracked = draw(st.booleans()), draw(st.booleans())
    no_bias = draw(st.booleans())
    norm = draw(st.sampled_from(kinds))[dims](
        3,
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.3])),
        momentum=draw(st.sampled_from([None, 0.0, 0.01, 0.1, 1.0])),
        affine=affine,
        track_running_stats=tracked,
    )
    if no_bias:
        norm.register_parameter("bias", None)
    norm = tried(norm, dims).to(draw(st.sampled_from([torch.float32, torch.float64])))
    if isinstance(norm, nn.BatchNorm2d) and type(norm) is nn.BatchNorm2d and draw(st.booleans()):
        norm = norm.to(draw(st.sampled_from([torch.bfloat16, torch.float16])))
    if affine:
        norm.weight.requires_grad_(draw(st.booleans()))
    return dims, hooked(norm).train(draw(st.booleans()))


STEPS = ("batchnorm", "torch", "sync", "torch_sync", Batch(), Ghost(2), Renorm(2.0, 1.0), Running())


@settings(max_examples=30)
@given(norms(), st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), st.booleans())
def test_every_way_there_has_a_way_back_to_the_bit(layer, steps, at_once):
    _, norm = layer
    before = everything(norm)
    home = "torch" if type(norm).__module__.startswith("torch") else "batchnorm"
    results = [convert(norm, to=step) for step in steps]
    if at_once:
        convert(norm, to="original")
    elif home == "torch":
        convert(norm, to="torch")
    else:
        for result in reversed(results):
            result.undo()
    assert everything(norm) == before


@settings(max_examples=30)
@given(norms(), st.sampled_from(STEPS))
def test_what_is_converted_keeps_all_that_is_not_its_class(layer, to):
    dims, norm = layer
    before = everything(norm)
    values = {name: None if t is None else t.clone() for name, t in norm._buffers.items()}
    result = convert(norm, to=to)
    after = everything(norm)
    names = ("eps", "momentum", "affine", "track_running_stats", "training", "note")
    for kept in (*names, "_forward_hooks", "_backward_hooks", "_state_dict_hooks"):
        assert after["attributes"][kept] == before["attributes"][kept]
    assert after["parameters"] == before["parameters"]
    assert (after["keys"], after["grads"]) == (before["keys"], before["grads"])
    for name, value in values.items():
        if value is not None:
            assert torch.equal(norm._buffers[name], value.to(norm._buffers[name].dtype))
    assert not result.needs_fine_tuning
    if to == "torch_sync":
        assert type(norm) is nn.SyncBatchNorm
    elif not result.skipped:
        assert type(norm) is (TORCH if to == "torch" else OURS)[dims]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("to", "dims"),
    [
        ("batchnorm", 1),
        ("batchnorm", 2),
        ("batchnorm", 3),
        (Ghost(2), 2),
        ("sync", 2),
        ("torch_sync", 1),
    ],
)
def test_outputs_and_statistics_are_those_of_a_layer_written_so(to, dims, training):
    norm = tried(TORCH[dims](3, eps=1e-3, momentum=0.3), dims).train(training)
    written = OURS[dims](3, eps=1e-3, momentum=0.3, statistics=to if to == Ghost(2) else None)
    written.load_state_dict(norm.state_dict())
    written.train(training)
    convert(norm, to=to)
    if to == "torch_sync":
        if training:
            return  # it needs a process group
        torch.testing.assert_close(norm(x := batch(dims)), written(x))
        return
    for _ in range(3):
        x = batch(dims)
        assert torch.equal(norm(x), written(x))
    for name, value in written.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3),
    )  # fmt: skip


def images(n=6):
    return torch.randn(n, 2, 6, 6)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
}


def step(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.flatten(1)[:, :3]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_converted(make):
    # no parameter whose gradient a batch norm behind it takes away, down to rounding: Adam enlarges
    # it; the loss has a target for the same reason
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3, bias=False), nn.BatchNorm1d(3),
    ).double()  # fmt: skip
    twin = copy.deepcopy(model)
    optimizers = [make(m.parameters()) for m in (model, twin)]
    for to in (None, "batchnorm", "torch", Batch(), "original"):
        if to is not None:
            convert(model, to=to, optimizer=optimizers[0])
        x = images().double()
        step(model, optimizers[0], x)
        step(twin, optimizers[1], x)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_the_model_itself_and_whoever_refers_to_a_layer_have_the_converted_one():
    norm = nn.BatchNorm2d(3)
    result = convert(norm, to="batchnorm")
    assert result.converted == {"": ("torch.nn.BatchNorm2d(3)", "batchnorm.BatchNorm2d(3)")}
    assert type(norm) is batchnorm.BatchNorm2d
    assert "the model" in repr(result)
    model = network()
    model.reference = [model[1]]  # no submodule
    convert(model, to=Ghost(3))
    assert model.reference[0] is model[1]
    assert model[1].statistics == Ghost(3)


def test_a_shared_layer_is_converted_once_and_stays_shared():
    norm = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.BatchNorm2d(2))})
    result = convert(model, to="batchnorm")
    assert list(result.converted) == ["a", "b.1"]
    assert model["a"] is model["b"][0] is norm
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.BatchNorm2d(2))})
    assert list(convert(model, to="torch", where="b.*").converted) == ["a"]


def test_where_means_layers_and_one_that_means_none_is_an_error():
    model = network()
    convert(model, to="batchnorm", where=lambda path, module: path == "4")
    assert [type(model[i]) for i in (1, 4, 7)] == [
        nn.BatchNorm2d, batchnorm.BatchNorm2d, nn.BatchNorm1d,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"where='head\.\*' means none of .* 3 batch norms"):
        convert(model, to="torch", where="head.*")
    nothing = convert(nn.Linear(2, 2), to="torch")
    assert (nothing.converted, nothing.skipped) == ({}, {})


def test_a_conversion_to_what_a_layer_is_does_nothing():
    model = network()
    convert(model, to=Ghost(2))
    before = [everything(model[i]) for i in (1, 4, 7)]
    for to in (Ghost(2), "batchnorm"):
        assert convert(model, to=to).converted == {}
    assert [everything(model[i]) for i in (1, 4, 7)] == before
    assert convert(network(), to="torch").converted == {}
    assert convert(network(), to="original").converted == {}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_copies_and_pickles_know_the_way_back(again):
    model, x = network(), images()
    model(x)
    before = copy.deepcopy(model)
    convert(model, to=Ghost(2))
    convert(model, to="torch_sync")
    twin = again(model)
    convert(twin, to="original")
    assert [type(m) for m in twin] == [type(m) for m in before]
    assert [vars(m).keys() for m in twin] == [vars(m).keys() for m in before]
    for name, value in before.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
    assert type(model[1]) is nn.SyncBatchNorm
    assert torch.equal(twin.eval()(x), before.eval()(x))


# All or nothing


@pytest.mark.parametrize("to", ["batchnorm", "torch_sync", "group_norm", "identity", Ghost(2)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_no_layer_converted(monkeypatch, to, error):
    model = network().bfloat16()
    before = [everything(module) for module in model if hasattr(module, "running_mean")]
    buffers = [id(b) for b in model.buffers()]
    done = []

    def become(*args):
        if len(done) == 2:
            raise error("in the middle")
        done.append(args)
        return original(*args)

    original = work.become
    monkeypatch.setattr(work, "become", become)
    with pytest.raises(error, match="in the middle"):
        convert(model, to=to)
    assert len(done) == 2
    after = [everything(module) for module in model if hasattr(module, "running_mean")]
    assert after == before
    assert [id(b) for b in model.buffers()] == buffers


class Looks(nn.Module):
    """A forward that asks what its layers are."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(x) * (2 if type(self.norm) is nn.BatchNorm2d else 1)


def test_outputs_that_change_though_nothing_should_undo_everything():
    model = Looks()
    before = everything(model.norm)
    with pytest.raises(RuntimeError, match=r"changes the outputs on the example by 0\.5"):
        convert(model, to="batchnorm", example=images())
    assert everything(model.norm) == before
    assert convert(model, to="batchnorm").difference is None


def test_an_example_is_only_looked_at():
    model = network()
    model(images())
    x, state, random = images(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    torch.set_rng_state(random)
    result = convert(nn.Sequential(model, nn.Dropout(0.5)), to="batchnorm", example=x)
    assert 0 <= result.difference < 1e-6
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Shifted(nn.Module):
    """Works on its input in place."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.sub_(1.0))


@pytest.mark.parametrize(
    "model",
    [Shifted(nn.BatchNorm2d(2)), nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(2))],
    ids=["subtraction", "relu"],
)
def test_a_model_that_works_in_place_leaves_the_example_alone(model):
    x = images()
    before = x.clone()
    assert convert(model, to="batchnorm", example=x).difference < 1e-6
    assert torch.equal(x, before)


# The way back, and its order


def test_undo_keeps_what_was_learned_since():
    model = network().double()
    twin = copy.deepcopy(model)
    result = convert(model, to="batchnorm")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(3):
        x = images().double()
        step(model, optimizers[0], x)
        step(twin, optimizers[1], x)
    result.undo()
    result.undo()  # once
    assert type(model[1]) is nn.BatchNorm2d
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("later", [Ghost(4), "torch", "group_norm", "original"])
def test_undo_out_of_order_is_refused_and_changes_nothing(later):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU())
    before = [everything(model[1]), type(model[2])]
    first = convert(model, to="batchnorm", fuse=True)
    second = convert(model, to=later)
    between = [everything(model[1]), type(model[2])]
    with pytest.raises(ValueError, match=r"its '1' is another layer than .* undo later changes"):
        first.undo()
    assert [everything(model[1]), type(model[2])] == between
    second.undo()
    first.undo()
    assert [everything(model[1]), type(model[2])] == before


def test_a_bias_is_not_put_back_before_the_norm_behind_it_is():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before, bias = everything(model[1]), model[0].bias
    first, second = convert(model, to="drop_bias"), convert(model, to="group_norm")
    with pytest.raises(ValueError, match=r"its '0' is another layer than"):
        first.undo()
    assert model[0].bias is None
    assert type(model[1]) is nn.GroupNorm
    second.undo()
    first.undo()
    assert everything(model[1]) == before
    assert model[0].bias is bias


def test_what_users_set_and_a_first_batch_are_no_later_conversion():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    result = convert(model, to=Ghost(2))
    model(images())
    model[0].eps, model[0].momentum = 0.1, None
    model[0].freeze()
    result.undo()
    assert (model[0].eps, model[0].momentum) == (0.1, None)
    assert not isinstance(model[0], BatchNorm)
    assert all(p.requires_grad for p in model.parameters())


# Layers within layers


class Outer(nn.BatchNorm2d):
    """A norm that holds another, which it does not use."""

    def __init__(self, channels):
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)


@pytest.mark.parametrize("to", ["batchnorm", "group_norm", "identity", Ghost(2)])
def test_norms_within_norms_and_at_two_paths_are_each_converted_once(to):
    # qubvel-org/segmentation_models.pytorch#488: mutated while it iterates named_modules
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(Outer(4), shared, nn.ModuleDict({"again": shared}), nn.BatchNorm2d(4))
    outer, inner = model[0], model[0].inner
    before = [everything(norm) for norm in (outer, inner, shared)]
    result = convert(model, to=to)
    assert list(result.converted) == ["0", "0.inner", "1", "3"]
    assert model[0] is outer
    assert outer.inner is inner
    assert model[1] is model[2]["again"] is shared
    assert len({type(norm) for norm in (outer, inner, shared, model[3])}) == 1
    assert type(shared) is not nn.BatchNorm2d
    result.undo()
    assert [everything(norm) for norm in (outer, inner, shared)] == before


def test_one_layer_is_told_of_as_one():
    model = network()
    assert repr(convert(model, to="batchnorm", where="1")).startswith(
        "Conversion to batchnorm: 1 layer\n"
    )
    assert repr(convert(model, to="batchnorm")).startswith("Conversion to batchnorm: 2 layers\n")


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "batch_norm"}, "to must be one of 'batchnorm', 'torch'"),
        ({"to": "torch", "fuse": True}, r"fuse= is an option of to='batchnorm'"),
        ({"to": "sync", "groups": 2}, r"groups= is an option of to='group_norm'"),
        ({"to": "torch", "process_group": 2}, r"process_group= is an option of to='sync'"),
        ({"to": "group_norm", "groups": 0}, "groups must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convert(network(), **options)


@pytest.mark.as_installed
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (network(), {"to": Ghost}, "to must be a name such as 'torch' or a policy"),
        ([1], {"to": "torch"}, "convert takes a torch.nn.Module that is not scripted, got list"),
        (network(), {"to": "torch", "optimizer": [1]}, "optimizer must be a torch.optim.Optimizer"),
    ],
)
def test_what_is_of_another_type_is_refused(model, options, message):
    with pytest.raises(TypeError, match=message):
        convert(model, **options)


def test_layers_on_the_meta_device_are_converted():
    with torch.device("meta"):
        model = network()
    convert(model, to="batchnorm")
    assert model[1].running_mean.is_meta
    result = convert(model, to="group_norm")
    assert not result.needs_fine_tuning
    assert isinstance(model[1], nn.GroupNorm)
    assert not isinstance(model[1], BatchNorm)


def test_a_layer_that_freeze_holds_is_left_with_the_way_to_convert_it():
    model = nn.Sequential(nn.BatchNorm2d(3))
    freeze(model)
    assert "unfreeze(model) first" in convert(model, to="batchnorm").skipped["0"]
    unfreeze(model)
    convert(model, to="batchnorm")
    assert type(model[0]) is OURS[2]


@pytest.mark.parametrize("hook", [adapt, lambda model: accumulate(model, 2)])
def test_hooks_that_ask_for_batch_norms_are_to_be_removed_first(hook):
    model = nn.Sequential(nn.BatchNorm2d(4)).eval()
    handle = hook(model)
    with pytest.raises(ValueError, match=r"remove\(\) them before converting"):
        convert(model, to="group_norm")
    assert type(model[0]) is nn.BatchNorm2d
    handle.remove()
    convert(model, to="group_norm")
    assert type(model[0]) is nn.GroupNorm

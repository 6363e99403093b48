"""Weights of Keras, Flax and PyTorch, each made and run by the framework itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm import BatchNorm2d
from batchnorm.repair.porting import port

SCRIPTS = Path(__file__).parent / "scripts"


def saved_by(script, folder):
    """What a script saved, run in a process of its own: a framework chooses its backend once."""
    path = folder / "saved.pt"
    environment = {
        "KERAS_BACKEND": "torch",
        "KERAS_HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run = subprocess.run(
        [sys.executable, script, str(path)],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    return saved_by("port_keras.py", tmp_path_factory.mktemp("keras"))


@pytest.fixture(scope="module")
def flax(tmp_path_factory):
    return saved_by("port_flax.py", tmp_path_factory.mktemp("flax"))


def channels_first(x):
    return torch.from_numpy(x).movedim(-1, 1)


def answers(model, x):
    with torch.no_grad():
        return model(channels_first(x))


def assert_answers(model, saved, tolerance=1e-5):
    want = torch.from_numpy(saved["y"])
    got = answers(model.eval(), saved["x"])
    got = got.movedim(1, -1) if got.ndim > 2 else got
    assert got.abs().max() > 0.5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


class Separable(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 2, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 6, 1)


class OfKeras(nn.Sequential):
    """The network of port_keras.py, with this library's layers and with torch.nn's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = BatchNorm2d(4, act="relu")
        self.mixing = nn.Conv2d(4, 8, 3, groups=4)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.separable = Separable()
        self.shifted = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 2, 3, 2)
        self.flatten = nn.Flatten()
        self.flat = nn.BatchNorm1d(9 * 7 * 2)
        self.dense = nn.Linear(9 * 7 * 2, 5)
        self.scaled = nn.BatchNorm1d(5)
        self.layer_norm = nn.LayerNorm(5)


KERAS_NAMES = {
    "net": "",
    "net/conv2d_1": "conv",
    "net/batch_normalization": "norm",
    "net/batch_normalization_1": "plain",
    "net/separable_conv2d": "separable",
    "net/batch_normalization_2": "scaled",
    "net/layer_normalization": "layer_norm",
}
BEHIND_FLATTEN = {"net/flat": (9, 7, 2), "net/dense": (9, 7, 2)}


def from_keras(saved, model, **options):
    options = {"renamed": KERAS_NAMES, "flattened": BEHIND_FLATTEN} | options
    told = {"eps": saved["eps"], "momentum": saved["momentum"]}
    return port(saved["weights"], "keras", model=model, **told, **options)


def test_a_keras_network_answers_as_it_did(keras):
    model = OfKeras()
    before = {name: id(p) for name, p in model.named_parameters()}
    porting = from_keras(keras, model)
    assert_answers(model, keras)
    assert {name: id(p) for name, p in model.named_parameters()} == before  # optimizers hold them
    assert porting.dropped == ("seed_generator/seed_generator_state",)
    assert porting.kernels == {
        "conv.weight": "convolution",
        "mixing.weight": "depthwise convolution",
        "separable.depthwise.weight": "depthwise convolution",
        "separable.pointwise.weight": "convolution",
        "up.weight": "transposed convolution",
        "dense.weight": "linear layer",
    }
    assert [n for n in porting.filled if not n.endswith("num_batches_tracked")] == [
        "shifted.weight",
        "scaled.bias",
    ]
    assert porting.names["plain.running_var"] == "net/batch_normalization_1/moving_variance"
    assert_same(porting.state_dict, state(model))


def test_kerass_own_variables_are_taken(keras):
    want = port(keras["weights"], "keras").state_dict
    assert len(want) == 28 + 7
    assert_same(keras["ported"], want)


def test_by_order_finds_the_layers_whatever_they_are_called(keras):
    model = OfKeras()
    weights = dict(keras["weights"])
    options = {"renamed": None, "by_order": True}
    porting = from_keras(keras | {"weights": weights}, model, **options)
    assert_answers(model, keras)
    assert porting.norms["scaled"].path == "net.batch_normalization_2"


def test_a_batch_leaves_what_it_leaves_in_keras(keras):
    model = OfKeras()
    porting = from_keras(keras, model)
    old = state(model)
    answers(model.train(), keras["x"])
    new = state(model)
    want = port(
        keras["after"], "keras", renamed=KERAS_NAMES, flattened={"net/flat": (9, 7, 2)}
    ).state_dict
    values = {"norm": 8 * 7 * 6, "plain": 8 * 5 * 4, "shifted": 8 * 4 * 3, "flat": 8, "scaled": 8}
    assert porting.norms.keys() == values.keys()
    for path, n in values.items():
        kept = 0.9 if path == "plain" else 0.99
        assert porting.norms[path].settings.momentum == round(1 - kept, 15)
        mean, var = f"{path}.running_mean", f"{path}.running_var"
        torch.testing.assert_close(new[mean], want[mean], rtol=1e-5, atol=1e-6)
        moved, biased = (after[var] - kept * old[var] for after in (new, want))
        assert biased.min() > 0
        # the share of the batch: PyTorch's variance is the unbiased one
        torch.testing.assert_close(moved, biased * (n / (n - 1)), rtol=2e-3, atol=3e-7)
        assert (moved - biased).norm() > 0.8 * biased.norm() / n


SINGLE = {
    "Conv1d": lambda i, o: nn.Conv1d(i, o, 3),
    "Conv3d": lambda i, o: nn.Conv3d(i, o, 2),
    "grouped": lambda i, o: nn.Conv2d(i, o, 3, groups=2),
    "depthwise": lambda i, o: nn.Conv2d(i, o, 3, groups=i),
    "depthwise 1d": lambda i, o: nn.Conv1d(i, o, 3, groups=i),
    "transposed 1d": lambda i, o: nn.ConvTranspose1d(i, o, 3, 2),
    "transposed 3d": lambda i, o: nn.ConvTranspose3d(i, o, 2, 2),
}
NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def single(name, saved):
    x, y = saved["x"], saved["y"]
    return nn.Sequential(SINGLE[name](x.shape[-1], y.shape[-1]), NORMS[x.ndim](y.shape[-1]))


@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv3d", "grouped", "depthwise 1d", "transposed 1d", "transposed 3d"]
)
def test_every_kind_of_convolution_of_keras(keras, name):
    model = single(name, keras[name])
    port(keras[name]["weights"], "keras", model=model, by_order=True)
    assert_answers(model, keras[name])
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("name", ["depthwise 1d", "transposed 1d"])
def test_without_a_model_the_layers_name_tells_its_kind(keras, name):
    model = single(name, keras[name])
    ported = port(keras[name]["weights"], "keras").state_dict
    first, second = dict.fromkeys(key.rpartition(".")[0] for key in ported)
    model.load_state_dict(
        {k.replace(second, "1").replace(first, "0"): v for k, v in ported.items()}
    )
    model[1].eps = 1e-3
    assert_answers(model, keras[name])


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False))


class OfFlax(nn.Sequential):
    """The network of port_flax.py."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = BatchNorm2d(4, act="relu")
        self.block = Block()
        self.up = nn.ConvTranspose2d(8, 3, (3, 2), 2)
        self.shifted = nn.BatchNorm2d(3)
        self.flatten = nn.Flatten()
        self.dense = nn.Linear(11 * 8 * 3, 5)
        self.last = nn.BatchNorm1d(5)
        self.layer_norm = nn.LayerNorm(5)


FLAX_NAMES = {
    "Conv_0": "conv",
    "BatchNorm_0": "norm",
    "Block_0": "block",
    "Block_0/Conv_0": "block.0",
    "Block_0/BatchNorm_0": "block.1",
    "ConvTranspose_0": "up",
    "BatchNorm_1": "shifted",
    "Dense_0": "dense",
    "LayerNorm_0": "layer_norm",
}


def from_flax(weights, model=None, **options):
    return port(
        weights,
        "flax",
        model=model,
        renamed=FLAX_NAMES,
        eps={"Block_0.BatchNorm_0": 1e-2},
        momentum={"Block_0.BatchNorm_0": 0.9},
        flattened={"Dense_0": (11, 8, 3)},
        **options,
    )


def test_a_flax_network_answers_as_it_did(flax):
    model = OfFlax()
    porting = from_flax(flax["weights"], model)
    assert_answers(model, flax)
    assert (model.norm.eps, model.norm.momentum) == (1e-5, 0.01)
    assert (model.block[1].eps, model.block[1].momentum) == (1e-2, 0.1)
    assert porting.kernels["up.weight"] == "transposed convolution"
    assert porting.names["norm.weight"] == "params/BatchNorm_0/scale"
    assert porting.names["norm.running_var"] == "batch_stats/BatchNorm_0/var"


def test_a_batch_leaves_what_it_leaves_in_flax(flax):
    model = OfFlax()
    from_flax(flax["weights"], model)
    old = state(model)
    answers(model.train(), flax["x"])
    new = state(model)
    want = port(
        flax["after"], "flax", renamed={k: v for k, v in FLAX_NAMES.items() if "Batch" in k}
    )
    for path, n in {"norm": 8 * 7 * 6, "block.1": 8 * 5 * 4, "shifted": 8 * 11 * 8}.items():
        kept = 0.9 if path == "block.1" else 0.99
        mean, var = f"{path}.running_mean", f"{path}.running_var"
        torch.testing.assert_close(new[mean], want.state_dict[mean], rtol=1e-5, atol=1e-6)
        moved, biased = (a[var] - kept * old[var] for a in (new, want.state_dict))
        torch.testing.assert_close(moved, biased * (n / (n - 1)), rtol=2e-3, atol=3e-7)


def test_all_forms_of_flax_variables_are_one(flax):
    want = port(flax["weights"], "flax").state_dict
    assert len(want) == 22 + 5
    assert len(flax["ported"]) == 4
    for ported in flax["ported"]:
        assert_same(ported, want)
    for name, value in flax["bfloat16"].items():
        assert torch.equal(value, want[name].to(value.dtype))
    assert flax["bfloat16"]["Dense_0.weight"].dtype is torch.bfloat16


def test_networks_of_flax_nnx(flax):
    saved = flax["nnx"]
    model = nn.Sequential()
    model.conv, model.norms = nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4))
    model.pool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.head = nn.Linear(4, 2)
    for ported in saved["ported"]:
        model.load_state_dict({k.replace(".layers.", "."): v for k, v in ported.items()})
        assert_answers(model, saved)


@pytest.mark.parametrize("name", ["Conv1d", "Conv3d", "depthwise", "transposed 1d"])
def test_every_kind_of_convolution_of_flax(flax, name):
    model = single(name, flax[name])
    port(flax[name]["weights"], "flax", model=model, renamed={"layer": "0", "norm": "1"})
    assert_answers(model, flax[name])


# --- what follows needs no other framework ---


def norm(channels=4, **changes):
    """A batch norm of Keras."""
    values = {
        "gamma": np.linspace(1, 2, channels),
        "beta": np.linspace(-1, 1, channels),
        "moving_mean": np.linspace(3, 4, channels),
        "moving_variance": np.linspace(0.5, 2, channels),
    }
    return {f"bn/{k}": v for k, v in (values | changes).items() if v is not None}


@given(kept=st.decimals(0, 1, places=4), eps=st.floats(1e-8, 1))
def test_momentum_is_the_other_share(kept, eps):
    ported = port(norm(), "keras", momentum=float(kept), eps=eps).norms["bn"]
    assert ported.settings == (eps, float(1 - kept))


@pytest.mark.parametrize(
    ("source", "want"),
    [("keras", (1e-3, 0.01)), ("flax", (1e-5, 0.01)), ("torch", (1e-5, 0.1))],
)
def test_the_defaults_of_each_framework(source, want):
    mean, var = {
        "keras": ("moving_mean", "moving_variance"),
        "flax": ("mean", "var"),
        "torch": ("running_mean", "running_var"),
    }[source]
    weights = {f"bn.{mean}": torch.zeros(3), f"bn.{var}": torch.ones(3)}
    assert port(weights, source).norms["bn"].settings == want


@settings(max_examples=20)
@given(n=st.integers(2, 1000))
def test_the_unbiased_variance_is_that_of_pytorch(n):
    x = torch.randn(n, 3, dtype=torch.float64)
    biased = x.var(0, correction=0)  # what momentum=0 leaves in Keras
    weights = norm(3, moving_mean=x.mean(0), moving_variance=biased)
    layer = nn.BatchNorm1d(3, momentum=1, dtype=torch.float64)
    layer(x)
    kept = port(weights, "keras").state_dict["bn.running_var"]
    assert torch.equal(kept, biased)
    for said in (n, {"bn": n}):
        var = port(weights, "keras", values_per_channel=said).state_dict["bn.running_var"]
        torch.testing.assert_close(var, layer.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("as_given", [torch.from_numpy, lambda array: array])
def test_the_weights_handed_in_are_left_alone(as_given):
    weights = {k: as_given(v) for k, v in norm().items()}
    for value in port(weights, "keras", values_per_channel=2).state_dict.values():
        value.add_(1)
    for name, value in norm().items():
        np.testing.assert_array_equal(np.asarray(weights[name]), value)


def test_other_spellings_of_keras():
    want = port(norm(), "keras").state_dict
    assert_same(port({f"{k}:0": v for k, v in norm().items()}, "keras").state_dict, want)
    nested = {"bn": {k.removeprefix("bn/"): v for k, v in norm().items()}}
    assert_same(port(nested, "keras").state_dict, want)
    renorm = norm() | {"bn/moving_stddev": np.ones(4), "bn/renorm_mean": np.ones(4)}
    porting = port(renorm, "keras")
    assert porting.dropped == ("bn/moving_stddev", "bn/renorm_mean")
    assert_same(porting.state_dict, want)


def test_random_states_are_no_weights():
    drop = {"drop": {"rngs": {"count": np.uint32(3), "key": object()}}}
    porting = port({"bn": {"mean": np.zeros(2), "var": np.ones(2)}} | drop, "flax")
    assert porting.dropped == ("drop/rngs/count", "drop/rngs/key")
    assert list(porting.names) == ["bn.running_mean", "bn.running_var"]


def test_what_is_not_known_is_passed_on_and_named():
    cell = {"gru/kernel": np.ones((3, 12)), "gru/recurrent_kernel": np.ones((4, 12))}
    porting = port(norm() | cell | {"embedding/embeddings": np.ones((5, 2))}, "keras")
    assert porting.unchanged == ["gru.recurrent_kernel"]
    assert porting.state_dict["gru.recurrent_kernel"].shape == (4, 12)
    assert porting.state_dict["embedding.weight"].shape == (5, 2)


def test_variances_of_zero_are_legal_with_eps():
    zero = np.zeros(4)
    layer = nn.Sequential(nn.BatchNorm1d(4)).eval()
    port(norm(moving_variance=zero), "keras", model=layer, renamed={"bn": "0"})
    y = layer(torch.full((1, 4), 5.0))
    want = (5 - np.linspace(3, 4, 4)) / np.sqrt(1e-3) * np.linspace(1, 2, 4) + np.linspace(-1, 1, 4)
    torch.testing.assert_close(y[0].double(), torch.from_numpy(want), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"is 0 in one of 4 channels where variance \+ eps ≤ 0"):
        port(norm(moving_variance=zero), "keras", eps=0.0)
    assert port(norm(moving_variance=zero - 0.9e-3), "keras").norms
    with pytest.raises(ValueError, match=r"bn/moving_variance is -0\.002 in one of 4 channels"):
        port(norm(moving_variance=zero - 2e-3), "keras")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moving_mean": None}, "bn has no 'moving_mean', only bn/gamma, bn/beta, bn/moving_var"),
        ({"moving_variance": None}, "bn has no 'moving_variance'"),
        ({"moving_mean": None, "moving_variance": None}, "no batch norm among 1 layers: none has"),
        ({"gamma": np.ones(3)}, r"bn/moving_mean has shape \(4,\), and bn/gamma \(3,\)"),
        ({"beta": np.ones((4, 1))}, r"bn/beta \(4, 1\)"),
        ({"moving_mean": np.array([0, np.nan, 0, np.inf])}, "bn/moving_mean holds 2 of 4 values"),
        ({"kernel": np.ones((2, 4))}, "bn/kernel and bn/gamma would both be the layer's 'weight'"),
    ],
)
def test_a_batch_norm_that_is_none_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        port(norm(**changes), "keras")


def test_a_batch_norm_by_name_that_lost_its_statistics_is_refused():
    lost = {"conv1_BN/gamma": np.ones(2), "conv1_BN/beta": np.ones(2)}
    with pytest.raises(ValueError, match="conv1_BN is a batch norm by its name, and has no"):
        port(norm() | lost, "keras")
    kept = {"subnet_ln/gamma": np.ones(2), "bn_dense/kernel": np.ones((2, 3))}
    assert "subnet_ln.weight" in port(norm() | kept, "keras").state_dict
    flax = {"params": {"BatchNorm_0": {"scale": np.ones(3), "bias": np.ones(3)}}}
    with pytest.raises(ValueError, match="no batch norm among 1 layers: none has 'mean' and 'var'"):
        port(flax, "flax")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": -1e-3}, "must not be negative, got -0.001 for bn"),
        ({"eps": float("nan")}, "got nan for bn"),
        ({"eps": {"bn1": 0.1}}, "eps: no layer at 'bn1'; near it is 'bn'"),
        ({"momentum": 1.5}, "momentum is a share, from 0 to 1, got 1.5"),
        ({"momentum": {"dense": 0.5}}, "momentum: no layer at 'dense'; near it is 'bn'"),
        ({"values_per_channel": 1}, "must be at least 2, got 1 for bn"),
        (
            {"renamed": {"batch": "norm"}},
            "renamed: no layer at 'batch'; near it is 'bn', 'conv', 'dense'",
        ),
        ({"renamed": lambda path: ""}, "dense/kernel and bn/gamma would both be 'weight'"),
        (
            {"flattened": {"bn": (3, 2)}},
            r"bn/gamma has 4 features, which are not those of \(3, 2\)",
        ),
        ({"flattened": {"dense": (3, 2)}}, r"dense/kernel has 4 features"),
        ({"flattened": {"conv": (2, 2)}}, "conv is no Linear and no batch norm"),
        ({"by_order": True}, "by_order needs a `model`"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    others = {"dense/kernel": np.ones((4, 2)), "dense/bias": np.ones(2)}
    weights = others | norm() | {"conv/kernel": np.ones((3, 3, 4, 4))}
    with pytest.raises(ValueError, match=said):
        port(weights, "keras", **options)


@pytest.mark.as_installed
def test_other_types_are_refused():
    with pytest.raises(ValueError, match="must be one of 'keras', 'flax', 'torch', got 'caffe'"):
        port(norm(), "caffe")
    with pytest.raises(TypeError, match=r"got list; for Keras pass \{v.path: v.numpy\(\)"):
        port(list(norm().values()), "keras")
    with pytest.raises(TypeError, match="as model, got type"):
        port(norm(), "keras", model=nn.BatchNorm1d)
    with pytest.raises(TypeError, match="renamed must return a path, got None for 'bn'"):
        port(norm(), "keras", renamed=lambda path: None)
    for value in (3, ["a"], None, np.array(["a"])):
        with pytest.raises(TypeError, match="bn/step is no array of numbers"):
            port(norm(step=value) | {"bn/step": value}, "keras")


def test_two_values_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"bn\.gamma and bn/gamma are one tensor's name"):
        port(norm() | {"bn.gamma": np.ones(4)}, "keras")


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def small_of_keras():
    return {
        "conv/kernel": np.ones((3, 3, 3, 4)),
        "conv/bias": np.ones(4),
        **norm(),
        "head/kernel": np.ones((4, 2)),
        "head/bias": np.ones(2),
    }


PLACES = {"conv": "0", "bn": "1", "head": "3"}


def changed(key, value):
    weights = small_of_keras()
    return {k: v for k, v in (weights | {key: value}).items() if v is not None}


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        (changed("head/kernel", np.ones((5, 2))), {}, r"head/kernel is \(2, 5\) in PyTorch's"),
        (changed("head/bias", None), {}, "nothing was given for its 3.bias"),
        (changed("more/kernel", np.ones((5, 2))), {}, r"no place for more.weight \(more/kernel\)"),
        (changed("head/kernel", np.full((4, 2), np.inf)), {}, "head/kernel holds 8 of 8"),
        (small_of_keras(), {"renamed": {"bn": "norm"}}, r"no place for .*norm\.running_mean"),
        (changed("bn/gamma", np.ones(5)), {}, "one value a channel"),
        (changed("head/kernel", np.full((4, 2), 1e300)), {}, "reaches 1e.300, which .*float32"),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(weights, options, said):
    model = small()
    before, was = state(model), (model[1].eps, model[1].momentum)
    with pytest.raises(ValueError, match=said):
        port(weights, "keras", model=model, **({"renamed": PLACES} | options))
    assert_same(state(model), before)
    assert (model[1].eps, model[1].momentum) == was


def test_an_interrupted_porting_leaves_the_model_as_it_was():
    class Stops(nn.BatchNorm2d):
        def __setattr__(self, name, value):
            if name == "momentum" and value == 0.25:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    model = small()
    model[1] = Stops(4)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        port(small_of_keras(), "keras", model=model, renamed=PLACES, momentum=0.75)
    assert_same(state(model), before)
    assert (model[1].eps, model[1].momentum) == (1e-5, 0.1)
    port(small_of_keras(), "keras", model=model, renamed=PLACES)
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            "3 layers with weights, and the mod",
        ),
        (nn.Sequential(nn.BatchNorm2d(4), *small()), "layer 1 is a layer whose weight has 4 dim"),
        (nn.Sequential(*small(), nn.BatchNorm1d(2)), "without a partner: 4"),
        (
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 2)),
            r"conv/kernel is \(4, 3, 3, 3\) in PyTorch's layout, and the model's '0.weight' \(5,",
        ),
    ],
)
def test_by_order_names_the_first_layer_that_differs(model, said):
    before = state(model)
    with pytest.raises(ValueError, match=said):
        port(small_of_keras(), "keras", model=model, by_order=True)
    assert_same(state(model), before)


def test_jax_sorts_names_and_keeps_no_order():
    weights = {"a.mean": torch.zeros(2), "a.var": torch.ones(2)}
    with pytest.raises(ValueError, match="JAX sorts"):
        port(weights, "flax", model=nn.Sequential(nn.BatchNorm1d(2)), by_order=True)


def test_models_without_values_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        port(norm(), "keras", model=nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="lies on the meta device, where nothing can be loaded"):
        port(norm(), "keras", model=nn.BatchNorm1d(4, device="meta"), renamed={"bn": ""})
    with pytest.raises(ValueError, match="bn/gamma lies on the meta device and has no values"):
        port(norm(gamma=torch.empty(4, device="meta")), "keras")


def test_a_layer_that_has_two_places_is_given_once():
    layer = nn.BatchNorm1d(4)
    port(norm(), "keras", model=nn.Sequential(layer, layer), renamed={"bn": "0"})
    assert layer.running_mean.tolist() == np.linspace(3, 4, 4, dtype="float32").tolist()
    for options in ({"renamed": {"bn": "1"}}, {"by_order": True}):
        porting = port(norm(), "keras", model=nn.Sequential(layer, layer), **options)
        nn.Sequential(layer, layer).load_state_dict(porting.state_dict)


def test_layers_with_frozen_statistics_are_given_eps():
    class Frozen(nn.Module):
        """As torchvision's and detectron2's: four buffers, ε, no counter."""

        def __init__(self, channels):
            super().__init__()
            self.eps = 1e-5
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.zeros(channels))

    layer = Frozen(4)
    porting = port(norm(), "keras", model=layer, renamed={"bn": ""})
    assert (layer.eps, hasattr(layer, "momentum")) == (1e-3, False)
    assert layer.running_var.tolist() == np.linspace(0.5, 2, 4, dtype="float32").tolist()
    assert porting.filled == []


def trained_small():
    model = small()
    for _ in range(2):
        model(torch.randn(5, 3, 3, 3))
    return model


def test_pytorch_goes_through():
    model = trained_small()
    for copied in (model.state_dict(), dict(port(model.state_dict(), "torch").state_dict)):
        twin = small()
        twin[1].eps, twin[1].momentum = 0.5, None
        porting = port(copied, "torch", model=twin)
        assert_same(state(twin), state(model))
        assert porting.norms["1"].settings == porting.norms["1"].before == (0.5, None)
        assert (twin[1].eps, twin[1].momentum) == (0.5, None)  # a state does not tell
        assert (porting.filled, porting.unchanged, porting.dropped) == ([], [], ())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
        AveragedModel,
    ],
)
def test_wrappers_come_off_both_sides(wrap):
    model = trained_small()
    wrapped = wrap(copy.deepcopy(model))
    assert wrapped.state_dict().keys() != model.state_dict().keys()
    porting = port(wrapped.state_dict(), "torch")
    assert_same(porting.state_dict, state(model))
    if not isinstance(wrapped, AveragedModel):  # whose count of models a plain state does not have
        target = wrap(small())
        port(model.state_dict(), "torch", model=target)
        assert_same(dict(target.state_dict()), dict(wrapped.state_dict()))


def test_a_layer_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.BatchNorm1d(2), "head": nn.Linear(2, 1)})
    assert_same(port(model.state_dict(), "torch").state_dict, state(model))


def test_old_checkpoints_have_no_count_of_batches():
    model = trained_small()
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    porting = port(old, "torch", model=model)
    assert porting.filled == ["1.num_batches_tracked"]
    assert model[1].num_batches_tracked.item() == 0
    del old["1.running_var"]
    with pytest.raises(ValueError, match=r"1 has no 'running_var', only 1\.weight, 1\.bias"):
        port(old, "torch")


def test_pytorchs_states_are_flat_and_unbiased():
    checkpoint = {"state_dict": trained_small().state_dict(), "epoch": 3}
    with pytest.raises(TypeError, match=r"state_dict is no array of numbers, but a OrderedDict"):
        port(checkpoint, "torch")
    with pytest.raises(ValueError, match="running variance of PyTorch is unbiased already"):
        port(checkpoint["state_dict"], "torch", values_per_channel=4)


def test_only_the_batch_norms_of_pytorch_must_be_finite():
    model = trained_small()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    assert port(model.state_dict(), "torch").state_dict["mask"].isinf().all()
    model[1].running_var[2] = torch.inf
    with pytest.raises(ValueError, match=r"1\.running_var holds 1 of 4 values that are not finite"):
        port(model.state_dict(), "torch")


def test_extra_states_go_along():
    class Extra(nn.BatchNorm1d):
        def get_extra_state(self):
            return {"scale": 3}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    twin = nn.Sequential(Extra(2))
    port(nn.Sequential(Extra(2)).state_dict(), "torch", model=twin)
    assert twin[0].scale == 3


def odd_small():
    """A model whose values are easily lost: a NaN's payload, the sign of a zero, an ε."""
    model = trained_small()
    with torch.no_grad():
        model[0].weight.view(torch.int32).view(-1)[0] = 0x7FC01234
        model[3].weight.view(-1)[0] = -0.0
    model[1].eps, model[1].momentum = 0.5, None
    return model


def bits(model):
    return {name: value.numpy().tobytes() for name, value in state(model).items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
    ],
)
def test_undo_gives_the_model_back_what_it_had(wrap):
    model = odd_small()
    before, held = bits(model), dict(model.named_parameters())
    porting = port(small_of_keras(), "keras", model=wrap(model), renamed=PLACES)
    ported = {name: value.clone() for name, value in porting.state_dict.items()}
    assert (model[1].eps, round(model[1].momentum, 9)) == (1e-3, 0.01)
    with torch.no_grad():
        model[0].bias.add_(1)  # trained since
    porting.undo()
    assert bits(model) == before
    assert (model[1].eps, model[1].momentum) == (0.5, None)
    assert all(model.get_parameter(name) is parameter for name, parameter in held.items())
    assert_same(porting.state_dict, ported)


def test_undo_gives_layers_back_that_took_the_place_of_others():
    model = odd_small()
    before = bits(model)
    porting = port(small_of_keras(), "keras", model=model, renamed=PLACES)
    model[1] = BatchNorm2d(4)
    porting.undo()
    assert bits(model) == before
    assert (model[1].eps, model[1].momentum) == (0.5, None)


def test_undo_gives_extra_states_back():
    class Extra(nn.BatchNorm1d):
        def __init__(self, scales):
            super().__init__(2)
            self.scales = scales

        def get_extra_state(self):
            return self.scales

        def set_extra_state(self, state):
            self.scales[:] = state  # what was handed out before changes with it

    model, other = nn.Sequential(Extra([3])), nn.Sequential(Extra([4]))
    porting = port(other.state_dict(), "torch", model=model)
    assert model[0].scales == [4]
    porting.undo()
    assert model[0].scales == [3]


def test_an_undo_that_fails_changes_nothing():
    porting = port(small_of_keras(), "keras", model=(model := odd_small()), renamed=PLACES)
    model[3] = nn.Linear(4, 7)
    ported = bits(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for 3\.weight"):
        porting.undo()
    assert bits(model) == ported
    assert model[1].eps == 1e-3
    with pytest.raises(ValueError, match=r"nothing to undo: .* no model"):
        port(small_of_keras(), "keras").undo()


def test_what_was_done_is_told():
    weights = small_of_keras() | {"seed/seed_generator_state": np.zeros(2, "int32")}
    del weights["bn/gamma"]
    porting = port(weights, "keras", model=small(), renamed=PLACES, momentum=0.9)
    assert repr(porting).splitlines() == [
        "Porting from Keras: 1 batch norm, 7 tensors",
        "  layer  in Keras  eps            momentum",
        "  1      bn        1e-05 → 0.001  0.1",
        "  kernels turned: 1 convolution, 1 linear layer",
        "  filled in: 1.weight",
        "  dropped: seed/seed_generator_state",
        "  wrong if behind a Flatten, say so by flattened=: 3.weight",
    ]
    alone = port(norm(), "keras", model=nn.BatchNorm1d(4), renamed={"bn": ""})
    assert "\n  the model  bn" in repr(alone)


def test_linear_layers_that_may_lie_behind_a_flatten_are_named():
    weights = {"conv/kernel": np.ones((3, 3, 2, 4)), "dense/kernel": np.ones((16, 5))}
    weights |= {f"norm/{name}": np.ones(4) for name in ("moving_mean", "moving_variance")}
    told = port(weights, "keras")
    assert told.unflattened == ("dense.weight",)
    assert "wrong if behind a Flatten, say so by flattened=: dense.weight" in repr(told)
    assert port(weights, "keras", flattened={"dense": (2, 2, 4)}).unflattened == ()
    del weights["conv/kernel"]
    assert port(weights, "keras").unflattened == ()

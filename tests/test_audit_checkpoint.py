from __future__ import annotations

import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.audit import checkpoints_at, read_checkpoint, state_of

NAMES = ("weight", "bias", "running_mean", "running_var", "batches")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ModuleDict({"norm": BatchNorm2d(5, affine=False), "group": nn.GroupNorm(1, 5)}),
        nn.LayerNorm(3),
    )


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


SAVED = {
    "model.safetensors": (save_file, lambda state: state, ""),
    "model.pt": (torch.save, lambda state: state, ""),
    "model.pth": (save_legacy, lambda state: state, ""),
    "last.ckpt": (
        torch.save,
        lambda state: {"epoch": 3, "state_dict": state, "loops": [{"fit": None}]},
        "state_dict.",
    ),
    "pytorch_model.bin": (torch.save, lambda state: {"module": {"net": state}}, "module.net."),
}


@pytest.mark.parametrize("name", SAVED)
def test_the_layers_of_a_checkpoint_are_those_of_the_model(tmp_path, name):
    save, wrap, prefix = SAVED[name]
    model = network()
    model[1](torch.randn(2, 4, 5, 5))
    save(wrap(model.state_dict()), tmp_path / name)
    state = read_checkpoint(tmp_path / name)
    wanted = state_of(model, "model")
    assert state.name == str(tmp_path / name)
    assert [layer.path for layer in state.layers] == [prefix + w.path for w in wanted.layers]
    assert [layer.path for layer in wanted.layers] == ["1", "2.norm"]
    for layer, want in zip(state.layers, wanted.layers, strict=True):
        assert (layer.eps, layer.module) == (None, None)
        for tensor in NAMES:
            got, right = getattr(layer, tensor), getattr(want, tensor)
            assert (got is None) == (right is None)
            assert got is None or torch.equal(got, right)


def test_a_layer_alone_is_a_checkpoint_too(tmp_path):
    torch.save(nn.BatchNorm1d(3).state_dict(), tmp_path / "layer.pt")
    (layer,) = read_checkpoint(tmp_path / "layer.pt").layers
    assert layer.path == "(root)"
    assert layer.is_initial


def test_a_directory_is_the_checkpoints_in_it(tmp_path):
    for name in ("b.pt", "a.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "c.pt").mkdir()
    assert [p.name for p in checkpoints_at(tmp_path)] == ["a.safetensors", "b.pt"]
    assert checkpoints_at(tmp_path / "b.pt") == [tmp_path / "b.pt"]
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints_at(tmp_path / "c.pt")


class Planted:
    """Code in a pickle: whoever unpickles it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch", "torch, legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, protocol):
    path, trace = tmp_path / "model.pt", tmp_path / "was_here"
    bad = {"state_dict": nn.BatchNorm1d(3).state_dict(), "callback": Planted(trace)}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(bad))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(ValueError, match="could run code of whoever made it") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if protocol != "pickle" else pickle.loads(  # noqa: S301
        path.read_bytes()
    )
    assert trace.exists()  # it would have


def refusal(path):
    """What a file is refused with; None where it is read."""
    try:
        read_checkpoint(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.pth"])
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
    save, _, _ = SAVED[name]
    whole = tmp_path / name
    save(network().state_dict(), whole)
    content = whole.read_bytes()
    rng = random.Random(0)  # noqa: S311 - no secret
    damaged = [content[:k] for k in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 1)]
    for _ in range(30):
        bytes_ = bytearray(content)
        for _ in range(rng.choice([1, 10, 200])):
            bytes_[rng.randrange(len(bytes_))] = rng.randrange(256)
        damaged.append(bytes(bytes_))
    damaged.append(rng.randbytes(1000))
    refused = 0
    for data in damaged:
        whole.write_bytes(data)
        said = refusal(whole)
        if said is not None:  # bytes of values may be any
            refused += 1
            assert "\n" not in said
            assert str(whole) in said
    assert refused >= 8


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors"])
def test_what_is_not_there_is_named(tmp_path, name):
    assert refusal(tmp_path / name) == f"no checkpoint at {tmp_path / name}"


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_only_batch_norm_s_tensors_are_read(tmp_path, name):
    save, _, _ = SAVED[name]
    big = nn.Sequential(nn.Linear(2000, 2000), nn.BatchNorm1d(2000))
    save(big.state_dict(), tmp_path / name)
    before = _resident()
    state = read_checkpoint(tmp_path / name)
    grown = _resident() - before
    assert len(state.layers) == 1
    assert grown < 4 * 2**20  # of 16 MB


def _resident():
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


def test_a_dictionary_that_holds_itself_is_read_once(tmp_path):
    state = {"norm": dict(nn.BatchNorm1d(3).state_dict())}
    state["again"] = state
    torch.save(state, tmp_path / "it.pt")
    (layer,) = read_checkpoint(tmp_path / "it.pt").layers
    assert layer.path == "norm"


def test_a_count_of_batches_tells_a_layer_whose_statistics_are_lost(tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    kept = {f"norm.{name}": t for name, t in state.items() if "running" not in name}
    torch.save(kept, tmp_path / "it.pt")
    (layer,) = read_checkpoint(tmp_path / "it.pt").layers
    assert (layer.path, layer.running_mean, int(layer.batches)) == ("norm", None, 0)

"""Checkpoints that commands read into models and write out of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.cli.weights import checked_destination, load_weights, save_tensors


def network(seed=0, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(4, 2, 1))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.ckpt"])
def test_what_was_saved_loads_bit_for_bit(name, tmp_path):
    one, other = network(0), network(1)
    one(torch.randn(2, 3, 8, 8))
    save_tensors(one.state_dict(), tmp_path / name)
    load_weights(other, tmp_path / name)
    assert same(other.state_dict(), one.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "optimizer": {"step": torch.tensor(1)}, "epoch": 3},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"model": {"_orig_mod." + key: value for key, value in state.items()}},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
    ids=["a trainer's", "of DDP", "of a compiled model", "without counts"],
)
def test_state_dicts_are_found_where_people_put_them(wrap, tmp_path):
    one, other = network(0), network(1)
    torch.save(wrap(one.state_dict()), tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert same(other.state_dict(), one.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("1.running_mean"), r"has no 1.running_mean$"),
        (lambda s: s.update({"1.running_maen": torch.ones(1)}), "holds 1.running_maen, which"),
        (lambda s: s.update({"1.weight": torch.ones(5)}), r"1.weight has shape \(5,\).*\(4,\)"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_loaded(change, said, tmp_path):
    state = network(0).state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    other = network(1)
    with pytest.raises(ValueError, match=said):
        load_weights(other, tmp_path / "w.safetensors")
    assert same(other.state_dict(), network(1).state_dict())


def test_of_two_state_dicts_neither_is_guessed(tmp_path):
    both = {"state_dict": network(0).state_dict(), "ema": network(1).state_dict()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"several state dicts that fit, state_dict\., ema\."):
        load_weights(network(), tmp_path / "w.pt")


def test_tied_weights_are_written_and_read_back(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_tensors(model.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["1.weight"], model[0].weight)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    path.write_bytes(b"old")

    def broken(tensors, to):
        Path(to).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"a": torch.ones(1)}, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("output", "in_place", "said"),
    [
        (None, False, "-o out.safetensors, or --in-place"),
        (None, None, r"-o out\.safetensors$"),
        ("in.pt", None, "is an input; give another path to -o$"),
        ("in.pt", False, "is an input.*--in-place"),
        ("out.txt", False, r"its name ends in \.safetensors"),
        ("nowhere/out.pt", False, "no directory"),
    ],
)
def test_a_bad_destination_is_refused(output, in_place, said, tmp_path):
    source = tmp_path / "in.pt"
    with pytest.raises(ValueError, match=said):
        checked_destination(
            None if output is None else tmp_path / output, [source], in_place=in_place
        )


def test_in_place_writes_over_the_input(tmp_path):
    source = tmp_path / "in.pt"
    assert checked_destination(None, [source], in_place=True) == source
    assert checked_destination(source, [source], in_place=True) == source

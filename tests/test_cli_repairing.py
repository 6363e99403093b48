"""The repairs as commands: a model, its weights, and where the result goes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from batchnorm.cli.commands import app

MODELS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )

def loader():
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 6, 6) * 2 + 1, torch.zeros(n)) for n in (32, 5)]

def empty():
    return []

def broken():
    raise ValueError("boom")
    yield

def by_name():
    return [{"input": torch.randn(2, 3, 6, 6)}]

class Extra(nn.BatchNorm2d):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass

def with_extra():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Extra(4))

def misfits():
    return [torch.randn(4, 2, 6, 6)]

def folded():
    model = make()
    model[1] = nn.Identity()
    return model

def keras_like():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a module of models, and weights that were trained a little."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repairable.py").write_text(MODELS)
    namespace: dict = {}
    exec(MODELS, namespace)  # noqa: S102 - the text above
    model = namespace["make"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    save_file(model.state_dict(), "in.safetensors")
    yield namespace
    sys.modules.pop("repairable", None)


def batchnorm(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def said(result) -> str:
    return " ".join(result.output.split())


def pooled(here) -> tuple[np.ndarray, np.ndarray]:
    """The mean and unbiased variance of all that enters the batch norm, in NumPy's float64."""
    model = here["make"]()
    model.load_state_dict(load_file("in.safetensors"))
    with torch.no_grad():
        x = torch.cat([model[0].double()(x.double()) for x, _ in here["loader"]()])
    values = x.transpose(0, 1).flatten(1).numpy()
    return values.mean(1), values.var(1, ddof=1)


@pytest.mark.parametrize("upstream", ["batch", "running"])
def test_recalibrate_writes_the_pooled_statistics_and_nothing_else(here, upstream):
    result = batchnorm(
        *("recalibrate", "repairable.py:make", "--weights", "in.safetensors"),
        *("--data", "repairable.py:loader", "-o", "out.safetensors", "--upstream", upstream),
    )
    assert result.exit_code == 0, result.output
    assert "Recalibration: 1 layer, 37 samples in 2 batches" in result.output
    assert "written to out.safetensors" in result.output
    before, after = load_file("in.safetensors"), load_file("out.safetensors")
    mean, var = pooled(here)
    np.testing.assert_allclose(after["1.running_mean"].numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(after["1.running_var"].numpy(), var, rtol=1e-6)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"1.running_mean", "1.running_var"}


def test_recalibrate_stops_at_so_many_samples(here):
    result = batchnorm(
        *("recalibrate", "repairable.py:make", "--data", "repairable.py:loader"),
        *("-o", "out.pt", "--samples", "33"),
    )
    assert "33 samples in 2 batches" in result.output


def test_in_place_writes_over_the_weights_and_only_then(here, tmp_path):
    before = (tmp_path / "in.safetensors").read_bytes()
    words = ["recalibrate", "repairable.py:make", "--weights", "in.safetensors"]
    words += ["--data", "repairable.py:loader"]
    refused = batchnorm(*words, "-o", "in.safetensors")
    assert refused.exit_code == 2
    assert "is an input; give another path to -o, or say --in-place" in said(refused)
    assert (tmp_path / "in.safetensors").read_bytes() == before
    assert batchnorm(*words, "--in-place").exit_code == 0
    assert (tmp_path / "in.safetensors").read_bytes() != before


def test_in_place_does_not_throw_a_trainer_s_other_things_away(here, tmp_path):
    torch.save({"state_dict": here["make"]().state_dict(), "epoch": 3}, "trained.pt")
    before = (tmp_path / "trained.pt").read_bytes()
    words = ["recalibrate", "repairable.py:make", "--weights", "trained.pt"]
    words += ["--data", "repairable.py:loader"]
    refused = batchnorm(*words, "--in-place")
    assert refused.exit_code == 2
    assert "trained.pt holds more than the model's tensors" in said(refused)
    assert (tmp_path / "trained.pt").read_bytes() == before
    assert batchnorm(*words, "-o", "out.pt").exit_code == 0
    assert torch.load("out.pt").keys() == here["make"]().state_dict().keys()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("repairable.py:empty", "at least one batch"),
        ("repairable.py:misfits", "failed on the batches of repairable.py:misfits"),
        ("repairable.py:broken", "failed on the batches of repairable.py:broken: ValueError: boom"),
        ("repairable.py:nothing", "has no nothing"),
    ],
)
def test_a_failure_is_one_line_and_writes_nothing(here, tmp_path, data, reason):
    files = sorted(tmp_path.iterdir())
    result = batchnorm("recalibrate", "repairable.py:make", "--data", data, "-o", "out.pt")
    assert result.exit_code == 2
    assert reason in said(result)
    assert len(result.output.strip().splitlines()) == 1
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == files


def test_fold_writes_weights_for_the_model_without_its_norm(here):
    result = batchnorm(
        *("fold", "repairable.py:make", "--weights", "in.safetensors"),
        *("--data", "repairable.py:loader", "-o", "out.safetensors"),
    )
    assert result.exit_code == 0, result.output
    assert "Folding: 1 of 1 batch norm" in result.output
    model, folded = here["make"]().eval(), here["folded"]()
    model.load_state_dict(load_file("in.safetensors"))
    folded.load_state_dict(load_file("out.safetensors"))
    x, _ = here["loader"]()[0]
    torch.testing.assert_close(folded(x), model(x))


def test_fold_writes_a_program_that_runs_without_the_model_s_code(here):
    result = batchnorm(
        *("fold", "repairable.py:make", "--weights", "in.safetensors"),
        *("--input", "2,3,6,6", "-o", "folded.pt2"),
    )
    assert result.exit_code == 0, result.output
    program = torch.export.load("folded.pt2")
    assert not [key for key in program.state_dict if "running" in key]
    model = here["make"]().eval()
    model.load_state_dict(load_file("in.safetensors"))
    for n in (2, 5, 1):
        x = torch.randn(n, 3, 6, 6)
        torch.testing.assert_close(program.module()(x), model(x))


def test_fold_exports_a_model_that_is_called_by_name(here):
    words = ["fold", "repairable.py:make", "--data", "repairable.py:by_name", "-o", "folded.pt2"]
    result = batchnorm(*words)
    assert result.exit_code == 0, result.output
    x = here["by_name"]()[0]["input"]
    expected = here["make"]().eval()(x)
    torch.testing.assert_close(torch.export.load("folded.pt2").module()(input=x), expected)


def test_a_state_that_no_file_can_hold_is_refused_before_anything_is_computed(here):
    words = ["recalibrate", "repairable.py:with_extra", "--data", "repairable.py:empty"]
    result = batchnorm(*words, "-o", "out.safetensors")
    assert result.exit_code == 2
    assert "more than tensors, '1._extra_state'" in said(result)


def test_where_chooses_layers(here):
    words = ["recalibrate", "repairable.py:make", "--data", "repairable.py:loader", "-o", "out.pt"]
    assert batchnorm(*words, "--where", "1").exit_code == 0
    refused = batchnorm(*words, "--where", "stem.*")
    assert refused.exit_code == 2
    assert "stem.*" in refused.output


def test_fold_needs_one_example(here):
    for words in ([], ["--input", "2,3,6,6", "--data", "repairable.py:loader"]):
        result = batchnorm("fold", "repairable.py:make", "-o", "out.pt", *words)
        assert result.exit_code == 2
        assert "either --data or --input" in said(result)


def test_convert_drops_cancelled_biases_out_of_a_checkpoint(here):
    result = batchnorm(
        *("convert", "repairable.py:make", "--to", "drop_bias", "--weights", "in.safetensors"),
        *("--input", "2,3,6,6", "-o", "out.safetensors"),
    )
    assert result.exit_code == 0, result.output
    before, after = load_file("in.safetensors"), load_file("out.safetensors")
    assert before.keys() - after.keys() == {"0.bias"}
    shifted = before["1.running_mean"] - before["0.bias"]
    torch.testing.assert_close(after["1.running_mean"], shifted)


def test_convert_refuses_what_it_does_not_know(here):
    result = batchnorm("convert", "repairable.py:make", "--to", "lint", "-o", "out.pt")
    assert result.exit_code == 2
    assert "lint" in result.output


def test_average_merges_statistics_as_moments(here):
    one = load_file("in.safetensors")
    other = {key: value + 1 for key, value in one.items()}
    save_file(other, "other.safetensors")
    result = batchnorm(
        *("average", "repairable.py:make", "in.safetensors", "other.safetensors"),
        *("--counts", "300,100", "-o", "out.safetensors"),
    )
    assert result.exit_code == 0, result.output
    merged = load_file("out.safetensors")
    torch.testing.assert_close(merged["0.weight"], one["0.weight"] + 0.25)
    torch.testing.assert_close(merged["1.running_mean"], one["1.running_mean"] + 0.25)
    # the mean of the variances, and how far the means lie apart: 1/4 · 3/4 · 1²
    torch.testing.assert_close(merged["1.running_var"], one["1.running_var"] + 0.25 + 3 / 16)


def test_average_with_data_estimates_again(here):
    save_file({k: v * 2 for k, v in load_file("in.safetensors").items()}, "other.safetensors")
    result = batchnorm(
        *("average", "repairable.py:make", "in.safetensors", "other.safetensors"),
        *("--data", "repairable.py:loader", "-o", "out.safetensors"),
    )
    assert result.exit_code == 0, result.output
    merged = load_file("out.safetensors")
    with torch.no_grad():
        x = torch.cat([x for x, _ in here["loader"]()])
        seen = nn.functional.conv2d(x, merged["0.weight"], merged["0.bias"])
    torch.testing.assert_close(merged["1.running_mean"], seen.mean((0, 2, 3)))


def test_average_refuses_counts_that_are_none(here):
    result = batchnorm(
        *("average", "repairable.py:make", "in.safetensors", "--counts", "many", "-o", "out.pt")
    )
    assert result.exit_code == 2
    assert "'many' are no numbers; write them as 5000,800" in said(result)


@pytest.mark.parametrize(
    ("name", "words", "dense", "norm"),
    [
        ("keras.npz", ["--model", "repairable.py:keras_like", "--by-order"], "0", "1"),
        ("keras.safetensors", [], "dense", "batch_normalization"),  # which sorts the names
    ],
)
def test_port_translates_names_and_layouts(here, name, words, dense, norm):
    weights = {
        "dense/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
        "dense/bias": np.ones(4, np.float32),
        "batch_normalization/gamma": np.full(4, 2, np.float32),
        "batch_normalization/beta": np.full(4, 3, np.float32),
        "batch_normalization/moving_mean": np.full(4, 4, np.float32),
        "batch_normalization/moving_variance": np.full(4, 5, np.float32),
    }
    if name.endswith(".npz"):
        np.savez(name, **weights)
    else:
        save_file({key: torch.from_numpy(value) for key, value in weights.items()}, name)
    result = batchnorm("port", name, "--source", "keras", *words, "-o", "out.safetensors")
    assert result.exit_code == 0, result.output
    ported = load_file("out.safetensors")
    np.testing.assert_array_equal(ported[f"{dense}.weight"].numpy(), weights["dense/kernel"].T)
    names = ("weight", "bias", "running_mean", "running_var")
    assert [ported[f"{norm}.{key}"][0].item() for key in names] == [2, 3, 4, 5]
    assert "0.001" in result.output  # Keras's ε, which no state dict tells


def test_port_takes_ε_and_momentum_as_they_are_there(here):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    np.savez("keras.npz", **{f"bn/{name}": np.ones(4, np.float32) for name in names})
    words = ["port", "keras.npz", "--source", "keras", "--eps", "1e-4", "--momentum", "0.9"]
    result = batchnorm(*words, "-o", "out.pt")
    assert result.exit_code == 0, result.output
    assert "0.0001" in result.output
    assert "0.1" in result.output.split()


def test_port_has_no_in_place_and_does_not_speak_of_it(here):
    np.savez("keras.npz", kernel=np.ones((2, 2)))
    result = batchnorm("port", "keras.npz", "--source", "keras")
    assert said(result) == "batchnorm: nowhere to write to; give -o out.safetensors"


def test_port_refuses_a_file_that_is_none(here, tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK no archive")
    result = batchnorm("port", "damaged.npz", "--source", "keras", "-o", "out.pt")
    assert result.exit_code == 2
    assert "cannot read damaged.npz" in said(result)

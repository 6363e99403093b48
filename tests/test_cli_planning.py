import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.cli import main
from batchnorm.planning import INFINIBAND, LOOPBACK

MODELS = """
import torch
from torch import nn
from batchnorm import BatchNorm2d

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), nn.Conv2d(8, 4, 3), BatchNorm2d(4))

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3))

def loader():
    torch.manual_seed(0)
    return [(torch.randn(8, 3, 6, 6), torch.zeros(8)) for _ in range(6)]

def few():
    return loader()[:2]

def wrong():
    return [torch.randn(2, 5, 6, 6) for _ in range(6)]

def torn():
    yield torch.randn(2, 3, 6, 6)
    raise KeyError("page")
"""
MAKE, LOADER = "planned_models.py:make", "planned_models.py:loader"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "planned_models", raising=False)
    Path("planned_models.py").write_text(MODELS)
    return tmp_path


@pytest.fixture
def batchnorm(monkeypatch, capfd):
    """The command in this process: its status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["batchnorm", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


def refused(result, said):
    """Exit status 2, and one line that says it."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("batchnorm: ")
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_model_alone_is_planned_by_the_bound(batchnorm):
    status, out, err = batchnorm("plan", "--ranks", 1024, "--batch", 4, MAKE)
    assert (status, err) == (0, "")
    assert out.startswith(f"{MAKE}\n\nPlan: 2 layers, 1,024 ranks of 4 samples\n")
    assert "statistics=Sync.groups_of(2): a noise of ≤ 0.43 standard deviations" in out
    assert f"Times are of {LOOPBACK.name}: " in out


def test_an_input_shows_positions_and_data_the_noise(batchnorm):
    _, shown, _ = batchnorm("plan", "--ranks", 8, "--batch", 4, MAKE, "--input", "2,3,6,6")
    assert "0.31 to 0.61" in shown  # four positions of the last layer
    _, measured, _ = batchnorm("plan", "--ranks", 8, "--batch", 4, MAKE, "--data", LOADER)
    assert "from the noise of batches" in measured
    assert " to " not in measured.split("group ")[1].split("\n\n")[0]


def test_the_numbers_of_a_network_are_taken(batchnorm):
    words = ("plan", "--ranks", 2, "--batch", 4, MAKE, "--backend", "nccl", "--step-time", 10)
    given = ("--latency", 100, "--message", 10, "--bandwidth", 1)
    _, out, _ = batchnorm(*words, *given)
    # forward and backward of 8 and of 4 channels: 4 collectives, 4 + 4 messages forward and
    # backward, and all-reduces of as much as is exchanged by two ranks
    seconds = 4 * 100e-6 + (2 + 2 * 2) * 10e-6 + 8 * (17 + 16 + 9 + 8) / 1e9
    assert f"{seconds * 1e3:.3g} ms" in out
    assert f"{seconds / 10e-3:.1%}" in out
    assert (
        "Times are of a network of --latency, --message, --bandwidth as given: 100 µs a "
        "collective, 10 µs a message, 1 GB/s."
    ) in out
    _, out, _ = batchnorm(*words, "--bandwidth", 1)
    assert f"a network of --bandwidth as given, the rest of {INFINIBAND.name}" in out
    _, out, _ = batchnorm(*words, "--bandwidth", "inf")
    assert "inf GB/s" in out


def test_the_allowed_noise_is_taken(batchnorm):
    _, out, _ = batchnorm("plan", "--ranks", 64, "--batch", 4, MAKE, "--max-noise", 0.1)
    assert "Sync.groups_of(64)" not in out
    assert "statistics=Sync(): a noise of ≤ 0.077" in out


def test_the_numbers_are_written_as_json(batchnorm):
    words = ("plan", "--ranks", 8, "--batch", 4, MAKE, "-o", "plan.json")
    status, out, _ = batchnorm(*words)
    assert status == 0
    written = json.loads(Path("plan.json").read_text())
    assert (written["version"], written["best"], written["ranks"]) == (1, 2, 8)
    assert [choice["group"] for choice in written["choices"]] == [1, 2, 4, 8]
    assert [layer["path"] for layer in written["layers"]] == ["1", "3"]
    assert written["choices"][1]["traffic"]["bytes"] == 8 * (17 + 16 + 9 + 8)
    assert written["network"]["backend"] == "gloo"
    assert "Plan: " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([MAKE], "plan what? batchnorm plan --ranks 1024 --batch 4 package.module:make_model"),
        (["--ranks", 8, "--batch", 4], "plan what?"),
        (["--ranks", 8, "--batch", 4, "nothing"], "'nothing' names nothing"),
        (["--ranks", 8, "--batch", 4, "planned_models.py:plain"], "there is nothing to synchron"),
        (["--ranks", 8, "--batch", 4, MAKE, "--input", "2;3"], "'2;3' is no shape"),
        (["--ranks", 8, "--batch", 4, MAKE, "--input", "2,5,6,6"], "failed on one tensor of shape"),
        (["--ranks", 8, "--batch", 4, MAKE, "--input", "2,3,6,6", "--data", LOADER], "one of them"),
        (["--ranks", 8, "--batch", 4, MAKE, "--data", "planned_models.py:few"], "4 batches on"),
        (["--ranks", 8, "--batch", 4, MAKE, "--data", "planned_models.py:wrong"], "failed on plan"),
        (["--ranks", 8, "--batch", 4, MAKE, "--data", "planned_models.py:torn"], "KeyError"),
        (["--ranks", 8, "--batch", 4, MAKE, "--max-noise", 0], "max_noise must be above 0"),
        (["--ranks", 8, "--batch", 4, MAKE, "--step-time", 0], "step must be above 0"),
        (["--ranks", 8, "--batch", 4, MAKE, "--latency", -1], "--latency is a number from 0 up"),
        (["--ranks", 8, "--batch", 4, MAKE, "--bandwidth", 0], "--bandwidth is above 0 GB/s"),
        (["--ranks", 8, "--batch", 4, MAKE, "--message", "inf"], "a message are a number from 0"),
        (["--ranks", 8, "--batch", 4, MAKE, "-o", "plan.txt"], "its name ends in .json"),
        (["--ranks", 8, "--batch", 4, MAKE, "-o", "no/plan.json"], "no directory no"),
        (["--measure", MAKE], "--measure stands alone"),
        (["--measure"], "--measure needs several processes: torchrun"),
    ],
)
def test_bad_input_is_refused_in_one_line(batchnorm, monkeypatch, words, said):
    monkeypatch.delenv("RANK", raising=False)
    refused(batchnorm("plan", *words), said)


def test_measured_under_torchrun_it_prints_what_to_pass_to_the_plan(batchnorm):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "-m", "batchnorm", "plan", "--measure"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "gloo between 4 ranks, measured. To plan with it:"
    number = r"(?:\d[\d.e+-]*|inf)"
    shape = rf"batchnorm (plan --backend gloo --latency {number} --message {number} "
    options = re.fullmatch(shape + rf"--bandwidth {number})", second)[1].split()
    status, out, _ = batchnorm(*options, "--ranks", 8, "--batch", 4, MAKE)
    assert status == 0
    assert "a network of --latency, --message, --bandwidth as given: " in out

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.audit import RULES
from batchnorm.cli import main
from batchnorm.kernels.switch import switched_to

CLEAN = """
import torch
from {library} import BatchNorm1d
layer = BatchNorm1d(3)
layer(torch.randn(4, 3))
print("trained")
"""
# found, and a fact of the code alone: no sampling
MISTAKEN = CLEAN + "with torch.no_grad():\n    layer(torch.randn(4, 3))\n"
LINE = 1 + MISTAKEN.count("\n", 0, MISTAKEN.index("    layer("))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with what a script may change in this process put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def batchnorm(monkeypatch, capfd):
    """The command in this process: its status, standard output and standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["batchnorm", *words])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


def script(text: str, library: str = "batchnorm", name: str = "train.py") -> str:
    Path(name).write_text(text.replace("{library}", library))
    return name


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit status 2, and one line that says all of the words."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert err.startswith("batchnorm: ")
    assert [word for word in words if word not in err] == []


# run


@pytest.mark.parametrize("library", ["torch.nn", "batchnorm"])
def test_the_report_goes_to_standard_error_and_the_rest_is_the_scripts(batchnorm, library):
    status, out, err = batchnorm("run", script(MISTAKEN, library))
    assert (status, out) == (0, "trained\n")
    assert "batchnorm watched 1 layer in 2 forward passes: 1 found\n" in err
    assert "BN108 warning: statistics moved with gradients off\n" in err
    assert f"  at   train.py:{LINE}\n" in err


@pytest.mark.parametrize("library", ["torch.nn", "batchnorm"])
def test_strict_fails_where_there_is_a_warning_alone(batchnorm, library):
    assert batchnorm("run", "--strict", script(CLEAN, library))[0] == 0
    assert batchnorm("run", "--strict", script(MISTAKEN, library))[0] == 1
    assert batchnorm("run", script(MISTAKEN, library))[0] == 0


def test_strict_fails_where_there_is_an_error(batchnorm):
    text = CLEAN + "try:\n    layer(torch.randn(1, 3))\nexcept ValueError:\n    pass\n"
    assert batchnorm("run", script(text))[0] == 0
    status, _, err = batchnorm("run", "--strict", script(text))
    assert status == 1
    assert "BN109 error: one value per channel" in err


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit('text')", 1),
        ("raise ValueError('x')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_the_scripts_own_status_is_never_hidden(batchnorm, end, expected, strict):
    status, out, err = batchnorm("run", *strict, script(MISTAKEN + end))
    assert (status, out) == (expected, "trained\n")
    assert "BN108 warning" in err


@pytest.mark.parametrize("end", ["sys.stdout.close()", "sys.stdout = None"])
def test_a_script_may_do_away_with_its_standard_output(batchnorm, monkeypatch, end):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    aside = "import io, sys\nsys.stdout = io.TextIOWrapper(io.BytesIO())\n"
    status, _, err = batchnorm("run", script(aside + MISTAKEN + end))
    assert status == 0
    assert "BN108 warning" in err


def test_output_holds_the_findings_as_json(batchnorm, folder):
    Path("old.json").write_text("old")
    for name in ("report.json", "old.json", str(folder / "absolute.json")):
        _, _, err = batchnorm("run", "-o", name, script(MISTAKEN))
        data = json.loads(Path(name).read_text())
        (finding,) = data["findings"]
        assert (data["version"], data["layers"], data["calls"]) == (1, 1, 2)
        assert (finding["code"], finding["severity"]) == ("BN108", "warning")
        assert (finding["place"], finding["modules"]) == (f"train.py:{LINE}", ["BatchNorm1d"])
        assert finding["message"] in err
    names = {"report.json", "old.json", "absolute.json", "train.py"}
    assert {path.name for path in folder.iterdir()} == names


def test_output_is_written_though_the_script_fails(batchnorm):
    status, _, _ = batchnorm("run", "--output", "report.json", script(MISTAKEN + "1 / 0"))
    assert status == 1
    assert len(json.loads(Path("report.json").read_text())["findings"]) == 1


def test_output_lies_where_it_was_asked_for_though_the_script_changes_directory(batchnorm, folder):
    (folder / "elsewhere").mkdir()
    batchnorm("run", "-o", "report.json", script("import os\nos.chdir('elsewhere')\n"))
    assert (folder / "report.json").exists()
    assert list((folder / "elsewhere").iterdir()) == []


def test_options_after_the_script_are_the_scripts(batchnorm):
    name = script("import sys\nprint(sys.argv)\n")
    words = ["--strict", "-o", "x.json", "--help", "-x", "", "--", "run", "γ"]
    status, out, _ = batchnorm("run", name, *words)
    assert (status, out) == (0, f"{[name, *words]}\n")
    assert not Path("x.json").exists()


def test_a_script_with_a_name_like_an_option_is_run_after_two_dashes(batchnorm):
    name = script("import sys\nprint(sys.argv)\n", name="--strict")
    assert batchnorm("run", "--", name, "-x")[:2] == (0, "['--strict', '-x']\n")


# What is refused, before anything starts

STARTED = "from pathlib import Path\nPath('started').touch()\n"


def test_a_script_that_does_not_exist_is_refused(batchnorm):
    refused(batchnorm("run", "nowhere.py"), "nowhere.py")


def test_a_directory_is_refused(batchnorm, folder):
    (folder / "package").mkdir()
    refused(batchnorm("run", "package"), "package")


def test_output_into_a_missing_directory_is_refused(batchnorm):
    refused(batchnorm("run", "-o", "no/such/report.json", script(STARTED)), "no/such")
    assert not Path("started").exists()


def test_output_onto_a_directory_is_refused(batchnorm, folder):
    (folder / "reports").mkdir()
    refused(batchnorm("run", "-o", "reports", script(STARTED)), "reports")
    assert not Path("started").exists()


def test_output_onto_the_script_is_refused(batchnorm, folder):
    text = "print('started')\n"
    (folder / "train.py").write_text(text)
    refused(batchnorm("run", "-o", "train.py", "train.py"), "is the script itself")
    assert (folder / "train.py").read_text() == text


def test_output_through_a_link_reaches_what_it_points_to(batchnorm, folder):
    (folder / "train.py").write_text("")
    (folder / "link.json").symlink_to(folder / "real.json")
    assert batchnorm("run", "-o", "link.json", "train.py")[0] == 0
    assert (folder / "link.json").is_symlink()
    assert json.loads((folder / "real.json").read_text())["version"] == 1


def test_a_report_that_cannot_be_written_is_one_line_after_the_run(batchnorm, folder, monkeypatch):
    (folder / "train.py").write_text("print('trained')\n")

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchnorm.cli.output.write_atomically", no_room)
    status, out, err = batchnorm("run", "-o", "report.json", "train.py")
    assert (status, out) == (2, "trained\n")
    assert err.splitlines()[-1].endswith("report.json: No space left on device")


def test_rules_are_readable_on_a_terminal_without_unicode(folder):
    run = subprocess.run(
        [sys.executable, "-m", "batchnorm", "rules", "BN103"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"What it finds" in run.stdout


def test_output_never_replaces_a_pipe_or_device_by_a_file(batchnorm, folder):
    # /dev/stdout and /dev/null are such, and root may replace them
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        batchnorm("run", "-o", "pipe", script(CLEAN))
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_no_command_shows_the_help(batchnorm):
    _, out, err = batchnorm()
    for command in ("run", "demo", "rules"):
        assert command in out + err


# rules


def test_rules_lists_every_rule_by_its_code(batchnorm):
    status, out, _ = batchnorm("rules")
    assert status == 0
    _, *lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [rule.code for rule in RULES]
    for rule, line in zip(RULES, lines, strict=True):
        assert rule.name in line
        assert rule.looks_at in line


@pytest.mark.parametrize("rule", RULES, ids=[rule.code for rule in RULES])
def test_rules_prints_a_page_with_every_heading(batchnorm, rule):
    status, out, _ = batchnorm("rules", rule.code.lower())
    assert status == 0
    assert f"{rule.code}: {rule.name}" in out
    wanted = ("What it finds", "Why it hurts", "Example", "Fix", "When it is fine", "Evidence")
    places = [out.find(heading) for heading in wanted]
    assert -1 not in places
    assert places == sorted(places)
    assert out == batchnorm("rules", rule.code)[1]


def test_an_unknown_rule_is_refused_with_those_that_are_known(batchnorm):
    refused(batchnorm("rules", "BN999"), "'BN999'", *(rule.code for rule in RULES))


def test_python_dash_m_is_the_same_command(batchnorm, folder):
    module = subprocess.run(
        [sys.executable, "-m", "batchnorm", "rules"], capture_output=True, text=True, check=True
    )
    assert module.stderr == ""
    assert module.stdout == batchnorm("rules")[1]


# demo


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_the_demo_runs_the_example_and_then_its_mistake(batchnorm, monkeypatch, failing):
    commands = []

    def run(command, **_):
        commands.append(command)
        status = 5 if len(commands) - 1 == failing else 0
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    status, out, _ = batchnorm("demo", "--epochs", "2")
    right, wrong = ["--epochs", "2"], ["--epochs", "2", "--forget-eval"]
    expected = [right, wrong] if failing != 0 else [right]
    assert status == (0 if failing is None else 5)
    assert [command[5:] for command in commands] == expected
    for command in commands:
        assert command[:4] == [sys.executable, "-m", "batchnorm", "run"]
        assert Path(command[4]).name == "digits.py"
        assert Path(command[4]).is_file()
        assert " ".join(command[5:]) in out


def test_doctor_names_what_runs_and_why(batchnorm, monkeypatch):
    status, out, err = batchnorm("doctor")
    assert (status, err) == (0, "")
    assert "CPU              compiled kernels: float32, float64 and bfloat16" in out
    monkeypatch.setattr(
        "batchnorm.kernels.diagnosis.reason_without", lambda: "Numba is not installed; …"
    )
    assert "Numba is not installed" in batchnorm("doctor")[1]


def test_doctor_says_in_a_line_that_there_are_no_such_kernels(batchnorm, monkeypatch):
    monkeypatch.setenv("BATCHNORM_KERNELS", "nonsense")
    monkeypatch.setattr("batchnorm.kernels.diagnosis.switched_to", switched_to.__wrapped__)
    status, out, err = batchnorm("doctor")
    assert (status, out) == (2, "")
    assert "BATCHNORM_KERNELS must be reference, interpreter or not set, got 'nonsense'" in err


MODELS = """
from torch import nn
from batchnorm import BatchNorm2d

def conv(inputs):
    return nn.Conv2d(inputs, 100, 3, padding=1)

def ours():
    return nn.Sequential(conv(3), BatchNorm2d(100, act="relu"), conv(100))

class Theirs(nn.Sequential):
    def __init__(self):
        super().__init__(conv(3), nn.BatchNorm2d(100), nn.ReLU(), conv(100))

made = ours()
number = 3

def nothing():
    pass

def broken():
    raise OSError("no such weights")

def exits():
    raise SystemExit(3)
"""


@pytest.fixture
def models(folder, monkeypatch):
    """A module of models in the working directory, which `check` may import from."""
    script(MODELS, name="some_models.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    yield
    sys.modules.pop("some_models", None)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("name", ["ours", "made", "Theirs"])
def test_check_memory_says_what_rematerialization_saves(batchnorm, name):
    status, out, err = batchnorm("check", "--memory", f"some_models:{name}", "--input", "5,3,50,20")
    assert (status, err) == (0, "")
    title, _, *rows = out.splitlines()
    assert title == f"some_models:{name}, 5×3×50×20, training"
    cells = [row.split() for row in rows]
    saved = ["2.0", "MB", "50%"]  # one of two tensors of 5·100·50·20 values
    assert cells[0][-2:] == ["4.0", "MB"]
    if name == "Theirs":
        assert cells[1][-3:] == ["4.0", "MB", "0%"]
        assert cells[2][-3:] == saved
    else:
        assert [row[-3:] for row in cells[1:]] == [saved]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("target", "shape", "words"),
    [
        ("some_models", "5,3,8,8", ["'some_models' names nothing", "package.module:name"]),
        ("some_models:exits", "5,3,8,8", ["exits() failed: SystemExit: 3"]),
        ("nowhere.py:ours", "5,3,8,8", ["cannot import nowhere.py", "no file nowhere.py"]),
        ("some_models:nix", "5,3,8,8", ["some_models has no nix"]),
        ("no_models:ours", "5,3,8,8", ["cannot import no_models", "No module named"]),
        ("some_models:number", "5,3,8,8", ["some_models:number is int, no torch.nn.Module"]),
        ("some_models:nothing", "5,3,8,8", ["some_models:nothing is NoneType, no torch.nn.Module"]),
        ("some_models:broken", "5,3,8,8", ["broken() failed: OSError: no such weights"]),
        ("./some_models:ours", "5,3,8,8", ["a path must name a file: ./some_models.py"]),
        ("some_models:ours", "5,3,8,b", ["'5,3,8,b' is no shape", "32,3,224,224"]),
        ("some_models:ours", "5,3,0,8", ["'5,3,0,8' is no shape"]),
        ("some_models:ours", "5,4,8,8", ["one tensor of shape (5, 4, 8, 8)", "to have 3 channels"]),
    ],
)
def test_check_refuses_what_it_cannot_check(batchnorm, target, shape, words):
    refused(batchnorm("check", "--memory", target, "--input", shape), *words)


def test_check_says_what_there_is_to_check(batchnorm):
    refused(batchnorm("check", "some_models:ours", "--input", "5,3,8,8"), "--memory")
    refused(batchnorm("check", "some_models:ours", "--memory"), "--input 32,3,224,224")


@pytest.mark.usefixtures("models")
def test_check_reports_what_it_finds_in_a_model_and_in_checkpoints(batchnorm, folder):
    text = MODELS + "\ndef bad():\n    return nn.Sequential(nn.BatchNorm2d(3, 0.1))\n"
    script(text, name="some_models.py")
    for target in ("some_models:bad", "some_models.py:bad", f"{folder}/some_models.py:bad"):
        status, out, err = batchnorm("check", target, "-o", "report.json")
        assert (status, err) == (0, "")
        assert f"batchnorm checked 1 layer of {target}: 1 found" in out
        assert "BN118 warning: " in out
        data = json.loads(Path("report.json").read_text())
        assert (data["subject"], data["layers"], data["calls"]) == (target, 1, 0)
        assert [f["code"] for f in data["findings"]] == ["BN118"]
    assert batchnorm("check", "--strict", "some_models:bad")[0] == 1
    assert batchnorm("check", "--strict", "some_models:ours")[0] == 0

    layer = torch.nn.BatchNorm1d(3)
    torch.save(layer.state_dict(), "good.pt")
    layer.running_var[1] = math.nan
    torch.save(layer.state_dict(), "bad.pt")
    status, out, _ = batchnorm("check", "--strict", "good.pt")
    assert (status, "nothing found" in out) == (0, True)
    status, out, _ = batchnorm("check", "--strict", ".")
    assert status == 1
    assert "BN101 error: running statistics that break inference" in out
    assert "  in   bad.pt: (root)\n" in out


def test_check_reads_no_code_and_refuses_what_it_cannot_read(batchnorm, folder):
    torch.save({"model": torch.nn.BatchNorm1d(3)}, "whole.pt")
    refused(batchnorm("check", "whole.pt"), "whole.pt holds more than tensors")
    Path("damaged.safetensors").write_bytes(b"\x08" + bytes(20))
    refused(batchnorm("check", "damaged.safetensors"), "cannot read damaged.safetensors")
    refused(batchnorm("check", "nowhere.pt"), "no checkpoint at nowhere.pt")
    (folder / "empty").mkdir()
    refused(batchnorm("check", "empty"), "no checkpoint in empty", ".safetensors")
    refused(batchnorm("check", "good.pt", "-o", "no/such/report.json"), "no/such")


LOADER = """
import torch

def loader():
    return [torch.randn(8, 3, 4, 4) for _ in range(6)]

wide = [torch.randn(8, 5, 4, 4)]
none = []
number = 3
"""


@pytest.mark.usefixtures("models")
def test_check_runs_batches_through_a_model(batchnorm):
    text = MODELS + "\ndef eight():\n    return nn.Sequential(nn.BatchNorm2d(3, affine=False))\n"
    text += "\ndef unused():\n    m = eight()\n    m[0].spare = nn.BatchNorm2d(3)\n    return m\n"
    script(text, name="some_models.py")
    script(LOADER, name="some_batches.py")
    status, out, _ = batchnorm("check", "some_models.py:eight", "--data", "some_batches.py:loader")
    assert status == 0
    assert "checked 1 layer of some_models.py:eight in 6 batches: nothing found" in out
    _, out, _ = batchnorm("check", "some_models.py:unused", "--data", "some_batches.py:loader")
    assert "BN131 info: layers that are never called" in out
    assert "  in   0.spare\n" in out
    for data, words in {
        "wide": ["failed on a batch of some_batches.py:wide", "RuntimeError"],
        "none": ["there are no batches"],
        "number": ["some_batches.py:number is int, no iterable of batches"],
    }.items():
        result = batchnorm("check", "some_models.py:eight", "--data", f"some_batches.py:{data}")
        refused(result, *words)
    result = batchnorm("check", "some.pt", "--data", "some_batches.py:loader")
    refused(result, "--data needs a model")


# What to report


def test_rules_are_selected_on_the_command_line(batchnorm):
    train = script(MISTAKEN)
    assert "BN108 warning" in batchnorm("run", train)[2]
    for words in (
        ["--ignore", "BN108"],
        ["--select", "BN103,BN109"],
        ["--select", "BN103", "--select", "bn109"],
        ["--severity", "error"],
    ):
        status, _, err = batchnorm("run", "--strict", *words, train)
        assert (status, "BN108 warning" in err) == (0, False), words
    assert batchnorm("run", "--strict", "--select", "BN10", train)[0] == 1


def test_pyproject_says_what_the_command_line_leaves_open(batchnorm, folder):
    train = script(MISTAKEN)

    def found(settings: str, *words: str) -> bool:
        Path("pyproject.toml").write_text("[tool.batchnorm]\n" + settings)
        return "BN108 warning" in batchnorm("run", *words, train)[2]

    assert found("")
    assert not found('ignore = ["BN108"]')
    assert not found('select = ["BN103"]')
    assert not found('severity = "error"')
    assert not found('per-module-ignores = { "BatchNorm1d" = ["BN1"] }')
    assert found('per-module-ignores = { "other" = ["BN1"] }')
    assert found('ignore = ["BN108"]', "--ignore", "BN103")  # instead of, not besides
    (folder / "below").mkdir()
    os.chdir("below")
    train = f"../{train}"
    Path("../pyproject.toml").write_text('[tool.batchnorm]\nignore = ["BN108"]\n')
    assert "BN108 warning" not in batchnorm("run", train)[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('selects = ["BN1"]', ["no setting selects", "per-module-ignores"]),
        ('select = "BN1"', ["select is a list of codes", "'BN1'"]),
        ("select = [1]", ["select is a list of codes"]),
        ('severity = "bad"', ["severity is one of error, warning, info", "'bad'"]),
        ('per-module-ignores = ["a"]', ["per-module-ignores is a table"]),
        ('ignore = ["BN9"]', ["no rule's code begins with BN9"]),
        ("select = [", ["cannot read", "pyproject.toml"]),
        ('a = 1\n[tool]\nbatchnorm = ""', ["pyproject.toml"]),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_runs(batchnorm, settings, words):
    Path("pyproject.toml").write_text("[tool.batchnorm]\n" + settings)
    refused(batchnorm("run", script(CLEAN)), *words)


def test_a_selection_of_no_rule_is_refused(batchnorm):
    refused(batchnorm("run", "--select", "BN9", script(CLEAN)), "begins with BN9")


# Other forms


def test_a_report_takes_the_form_of_its_name(batchnorm):
    for name, begins in {
        "report.json": "{",
        "report.sarif": "{",
        "report.html": "<!doctype html>",
    }.items():
        assert batchnorm("run", "-o", name, script(MISTAKEN))[0] == 0
        text = Path(name).read_text()
        assert text.lower().startswith(begins)
        assert "BN108" in text
    refused(batchnorm("run", "-o", "report.txt", script(CLEAN)), "names no form of report", ".html")


def test_annotations_for_a_workflow(batchnorm):
    _, _, err = batchnorm("run", "--format", "github", script(MISTAKEN))
    assert f"::warning file=train.py,line={LINE},title=BN108" in err


# Exported graphs, references, labels, deployment

TRAINED = """
import torch
from torch import nn

def model(eps=1e-5):
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4, eps=eps), nn.Linear(4, 3)).train()

def trained():
    m = model()
    for x, _ in data():
        m(x)
    return m

def other_eps():
    return model(1e-3)

def average():
    m = trained()
    with torch.no_grad():
        m[0].weight += 1
    return m

def data(shift=0.0):
    torch.manual_seed(1)
    return [(torch.randn(16, 4) + shift, torch.randint(3, (16,))) for _ in range(30)]

def elsewhere():
    return data(3.0)

def program():
    return torch.export.export(model(), (torch.randn(2, 4),))

def unlabelled():
    return [x for x, _ in data()]
"""


def test_check_compares_with_a_reference(batchnorm):
    script(TRAINED, name="it.py")
    _, out, _ = batchnorm("check", "it.py:other_eps", "--reference", "it.py:model")
    assert "BN118 warning" in out
    assert "ε = 0.001 where it.py:model has 1e-05" in out
    _, out, _ = batchnorm("check", "it.py:average", "--reference", "it.py:trained")
    assert "BN105 info" in out
    refused(batchnorm("check", "it.py:model", "--reference", "it.py:program"), "exported program")
    refused(batchnorm("check", "it.py:model", "--reference", "none.pt"), "no checkpoint at none.pt")


def test_check_looks_at_losses_and_at_deployment(batchnorm):
    script(TRAINED, name="it.py")
    to_data = ["--data", "it.py:data"]
    _, out, _ = batchnorm("check", "it.py:trained", *to_data, "--deploy", "it.py:elsewhere")
    assert "BN126 warning" in out
    _, out, _ = batchnorm("check", "it.py:trained", "--data", "it.py:elsewhere", "--labels")
    assert "BN103 warning" in out
    assert "; the loss is " in out
    refused(batchnorm("check", "it.py:model", "--labels"), "need --data")
    refused(batchnorm("check", "it.py:model", "--deploy", "it.py:elsewhere"), "need --data")
    result = batchnorm("check", "it.py:model", "--data", "it.py:unlabelled", "--labels")
    refused(result, "a batch with labels is (input, label)")


@pytest.mark.as_installed
def test_check_reads_exported_programs(batchnorm):
    script(TRAINED, name="it.py")
    status, out, _ = batchnorm("check", "--strict", "it.py:program")
    assert status == 1
    assert "BN120 error" in out
    refused(batchnorm("check", "it.py:program", "--memory", "--input", "2,4"), "exported program")


def test_memory_stands_alone(batchnorm):
    script(TRAINED, name="it.py")
    for words in (["--strict"], ["-o", "r.json"], ["--data", "it.py:data"], ["--select", "BN1"]):
        refused(batchnorm("check", "it.py:model", "--memory", "--input", "2,4", *words), "alone")


def test_a_terminal_without_greek_is_printed_to(folder):
    script("from torch import nn\nmodel = nn.BatchNorm1d(3).requires_grad_(False)\n", name="it.py")
    for words in ([], ["--format", "github"]):
        command = [sys.executable, "-m", "batchnorm", "check", "it.py:model", *words]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        result = subprocess.run(command, capture_output=True, env=environment, check=True)
        assert b"\\u03b3 and \\u03b2 frozen" in result.stdout

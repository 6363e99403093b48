"""`batchnorm run` in the settings people train in: real scripts, with the frameworks themselves.

Every script in `scripts/` saves what its training leaves at the path it is given, and makes one
mistake; most train a second model without it, which nothing may be found in.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from launched import SCRIPTS, python, torchrun


def plain_and_watched(
    folder: Path, script: str, *launcher: str
) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess, dict]:
    """The script as it is, then under `batchnorm run`, and the report of that."""
    run = ("-m", "batchnorm", "run", "-o", str(folder / "report.json"))
    plain = python(*launcher, script, str(folder / "plain.pt"))
    watched = python(*launcher, *run, script, str(folder / "watched.pt"))
    assert watched.returncode == plain.returncode, watched.stderr
    return plain, watched, json.loads((folder / "report.json").read_text())


def assert_same_bits(folder: Path, end: str = "") -> None:
    ours, theirs = (torch.load(folder / f"{name}.pt{end}") for name in ("watched", "plain"))
    assert len(ours) > 5
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def the_mistake(script: str) -> str:
    """`file:line` of the line that says it is one."""
    lines = (SCRIPTS / script).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if "  # the mistake" in line)
    return f"{script}:{number}"


def modules_of_the_finding(report: dict, code: str, script: str) -> list[str]:
    """Of the only one, which is of the mistake."""
    assert report["disabled"] == {}
    findings = [(f["code"], f["place"]) for f in report["findings"]]
    assert findings == [(code, the_mistake(script))]
    return report["findings"][0]["modules"]


def without_report(stderr: str) -> str:
    """Standard error before the report, which starts with an empty line."""
    return stderr.partition("\nbatchnorm ")[0]


def test_lightning(tmp_path):
    plain, watched, report = plain_and_watched(tmp_path, "lightning_fit.py")
    assert_same_bits(tmp_path)
    assert watched.stdout == plain.stdout
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["right", "wrong"]
    assert without_report(watched.stderr) == plain.stderr
    # Lightning itself ends a script with 1 that was interrupted
    assert plain.stderr.endswith("Detected KeyboardInterrupt, attempting graceful shutdown ...\n")
    assert watched.returncode == 1
    assert report["layers"] == 3 * 2  # teacher and student of the two runs, and the interrupted one
    assert modules_of_the_finding(report, "BN108", "lightning_fit.py") == ["Teacher#2.1"]


def test_the_trainer_of_transformers(tmp_path):
    plain, watched, report = plain_and_watched(tmp_path, "transformers_trainer.py")
    assert_same_bits(tmp_path)
    assert (watched.returncode, watched.stdout) == (0, plain.stdout)
    assert without_report(watched.stderr) == plain.stderr
    assert report["layers"] == 2 * 6
    modules = modules_of_the_finding(report, "BN108", "transformers_trainer.py")
    assert len(modules) == 6
    assert {name.partition(".")[0] for name in modules} == {"ResNetForImageClassification#2"}


def test_compiled_models(tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    plain, watched, report = plain_and_watched(tmp_path, "compiled.py")
    assert_same_bits(tmp_path)
    assert (watched.returncode, watched.stdout) == (0, plain.stdout)
    assert "hook" not in watched.stderr
    assert (report["layers"], report["calls"]) == (3, 3 * (40 + 1))
    modules = modules_of_the_finding(report, "BN108", "compiled.py")
    assert modules == ["Net.1", "Net#2.1", "Eager.1"]


def test_two_models_in_mixed_precision(tmp_path):
    plain, watched, report = plain_and_watched(tmp_path, "gan.py")
    assert_same_bits(tmp_path)
    assert (watched.returncode, watched.stdout) == (0, plain.stdout)
    assert without_report(watched.stderr) == plain.stderr
    assert (report["layers"], report["calls"]) == (3, 60 * (2 + 3) + 3 * 2)
    # generated images are less varied than real ones, and the discriminator is given both
    two = [finding for finding in report["findings"] if finding["code"] == "BN123"]
    assert [finding["modules"] for finding in two] == [["Discriminator.1"]]
    report["findings"] = [finding for finding in report["findings"] if finding not in two]
    assert modules_of_the_finding(report, "BN108", "gan.py") == ["Generator.1", "Generator.4"]


def test_batches_from_forked_and_spawned_workers(tmp_path):
    plain, watched, report = plain_and_watched(tmp_path, "workers.py")
    assert_same_bits(tmp_path)
    assert (watched.returncode, watched.stdout) == (1, plain.stdout)
    said = "ValueError: Expected more than 1 value per channel when training"
    for run in (plain, watched):
        last = without_report(run.stderr).splitlines()[-1]
        assert last.startswith(said)
    assert watched.stderr.count("\nbatchnorm ") == 1  # workers do not report
    assert report["calls"] == 4 + 5
    assert modules_of_the_finding(report, "BN109", "workers.py") == ["Sequential.1"]


def test_two_ranks_of_torchrun(tmp_path):
    plain, watched, report = plain_and_watched(tmp_path, "ddp.py", *torchrun(2))
    for rank in range(2):
        assert_same_bits(tmp_path, f".{rank}")
    assert (watched.returncode, watched.stdout) == (0, plain.stdout)
    assert watched.stdout.startswith("2 ranks, loss ")
    # of one rank: its 16 batches in 3 epochs, trained on and evaluated, in 2 layers of 2 models
    assert (report["layers"], report["calls"]) == (4, 3 * 16 * 2 * 2 * 2)
    second = "DistributedDataParallel#2.module"
    assert modules_of_the_finding(report, "BN108", "ddp.py") == [f"{second}.1", f"{second}.4"]
    # both ranks saw it, and one says so; that they differ between two forward passes is nothing
    assert (report["ranks"], report["endings"]) == (2, [])
    assert report["findings"][0]["ranks"] == []
    assert {"BN112", "BN114"} <= set(report["rules"])
    assert watched.stderr.count("\nbatchnorm watched 4 layers") == 1
    assert watched.stderr.count("BN108 warning: statistics moved with gradients off") == 1


def test_an_error_in_another_rank_of_torchrun_is_told_by_the_first():
    script = "ddp_uneven.py"
    run = python(*torchrun(2), "-m", "batchnorm", "run", script)
    assert run.returncode == 1  # as torchrun has it, whatever became of the other rank
    assert "[rank1]: ValueError: Expected more than 1 value per channel" in run.stderr
    seen = "batchnorm watched 1 layer in 1 forward pass on the rank that reports, of 2"
    assert run.stderr.count(f"\n{seen}") == 1
    assert run.stderr.count("BN109 error: one value per channel") == 1
    assert f"  at   {the_mistake(script)}\n  on   rank 1 of 2\n" in run.stderr
    assert re.search(r"\n  ranks? (0 and )?1 of 2: exit status 1\n", run.stderr)

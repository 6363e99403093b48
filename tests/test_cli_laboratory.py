"""`batchnorm lab`, as somebody types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import invented
from batchnorm.cli import main
from batchnorm.lab import claims

# typer hands over a context of another class than the one by which it is asked for
pytestmark = pytest.mark.as_installed


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made_up(monkeypatch):
    """A laboratory of claims that cost nothing."""
    monkeypatch.setattr(claims, "CLAIMS", (invented.Invented, invented.Failing))


@pytest.fixture
def batchnorm(monkeypatch, capfd):
    """The command in this process: its status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["batchnorm", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


def refused(batchnorm, *words):
    status, out, err = batchnorm(*words)
    assert status == 2
    assert not out
    return err


def test_lab_lists_all_claims(batchnorm):
    status, out, _ = batchnorm("lab")
    assert status == 0
    for claim in claims.CLAIMS:
        assert f"{claim.number:>2}  {claim.name} " in out
    assert "batchnorm lab run" in out


def test_show_says_what_is_expected_and_how_it_is_measured(batchnorm):
    status, out, _ = batchnorm("lab", "show", "converges-faster")
    assert status == 0
    assert "Ioffe & Szegedy 2015" in out
    assert "residual network, 7 layers" in out
    assert "> 1.5 ×" in out
    assert "six learning rates" in out
    assert batchnorm("lab", "show", "1")[1] == out


def test_a_run_leaves_numbers_and_a_figure_and_the_page_has_both(batchnorm, made_up, folder):
    status, out, err = batchnorm("lab", "run", "invented", "--profile", "full", "--processes", 1)
    assert status == 0, err
    assert "1 invented: depends: holds for one; fails for two" in err
    assert "depends" in out
    assert "2 points [2, 2]" in out
    results = folder / "batchnorm-lab" / "full"
    assert sorted(path.name for path in results.iterdir()) == ["invented.json", "invented.svg"]
    assert json.loads((results / "invented.json").read_text("utf-8"))["verdict"] == "depends"

    status, out, _ = batchnorm("lab", "report")
    assert status == 0
    assert "batchnorm-lab/full/evidence.html" in out
    assert "2 points [2, 2], fails" in (results / "evidence.html").read_text("utf-8")
    status, _, _ = batchnorm("lab", "report", results, "-o", "evidence.md")
    assert status == 0
    assert "(batchnorm-lab/full/invented.svg)" in Path("evidence.md").read_text("utf-8")


def test_all_runs_all_and_says_what_failed(batchnorm, made_up, folder):
    status, out, err = batchnorm("lab", "run", "all", "--seeds", 2, "-o", "here", "--processes", 1)
    assert status == 1
    assert "no verdict" in out
    assert "unfinished" in out
    assert "failing failed in Trial(arm='none', seed=1): ArithmeticError: an odd seed" in err
    assert (folder / "here" / "invented.svg").exists()
    status, out, _ = batchnorm("lab", "report", "here")
    assert status == 0
    assert "2 trials yet to run" in out
    assert "failing" not in (folder / "here" / "evidence.html").read_text("utf-8")


def test_bad_input_is_refused_before_anything_runs(batchnorm, made_up, folder):
    assert "no claim 'converges'" in refused(batchnorm, "lab", "run", "converges")
    assert "no claim 'x'" in refused(batchnorm, "lab", "show", "x")
    assert "--device tpu cannot be used" in refused(batchnorm, "lab", "run", "1", "--device", "tpu")
    assert "make some: batchnorm lab run all" in refused(batchnorm, "lab", "report")
    assert "make some" in refused(batchnorm, "lab", "report", folder)
    assert "its name ends in .html or .md" in refused(
        batchnorm, "lab", "report", folder, "-o", "page.pdf"
    )
    (folder / "invented.json").write_text("{}")
    assert "holds no results" in refused(batchnorm, "lab", "run", "1", "-o", folder)
    assert "holds no results" in refused(batchnorm, "lab", "report", folder)
    assert (folder / "invented.json").read_text() == "{}"
    assert "cannot use" in refused(batchnorm, "lab", "run", "1", "-o", folder / "invented.json")
    assert sorted(path.name for path in folder.iterdir()) == ["invented.json"]


def test_results_of_another_profile_are_not_mixed_in(batchnorm, made_up):
    assert batchnorm("lab", "run", "1", "-o", "here", "--processes", 1)[0] == 0
    err = refused(batchnorm, "lab", "run", "1", "-o", "here", "--profile", "full")
    assert "results of the profile quick, not full" in err


def test_what_is_not_installed_is_named(batchnorm, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")

    monkeypatch.setattr("batchnorm.cli.laboratory.import_module", missing)
    for words in (["lab"], ["lab", "run", "all"], ["lab", "report"], ["lab", "show", "1"]):
        assert "needs mlxtend; pip install 'batchnorm[lab]'" in refused(batchnorm, *words)


def test_other_commands_do_without_the_lab_s_libraries():
    code = (
        "import sys; import batchnorm.cli.commands;"
        "print(sorted({'sklearn', 'mlxtend', 'matplotlib', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_real_run_is_interrupted_and_goes_on(folder):
    """Ctrl-C reaches the whole group; what had run is not run again."""
    words = [
        sys.executable,
        "-m",
        "batchnorm",
        "lab",
        "run",
        "converges-faster",
        "--processes",
        "1",
    ]
    path = folder / "batchnorm-lab" / "quick" / "converges-faster.json"
    first = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGINT)
        _, err = first.communicate(timeout=60)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate()
    assert first.returncode == 130
    assert "interrupted; what had run is in batchnorm-lab/quick: run again to go on" in err
    assert "Traceback" not in err
    before = json.loads(path.read_text("utf-8"))["trials"]
    assert 1 <= len(before) < 8
    second = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    after = json.loads(path.read_text("utf-8"))["trials"]
    assert len(after) == 8
    assert all(row in after for row in before)  # with the seconds that it took then
    assert "no verdict" in second.stdout

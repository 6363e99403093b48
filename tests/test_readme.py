"""What the README shows is what happens."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchnorm.cli.commands import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_examples_print_what_stands_below_them(code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})  # noqa: S102 - the README's own code
    assert out.getvalue() == printed


@pytest.mark.parametrize("command", ["rules", "check --memory", "plan"])
def test_commands_print_what_stands_below_them(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shown = re.search(rf"\$ batchnorm ({command}.*)\n\n```text\n((?:.*\n)*?)```", README)
    result = CliRunner().invoke(app, shown[1].split(), env={"COLUMNS": "100"})
    assert [line.split() for line in result.output.splitlines()] == [
        line.split() for line in shown[2].splitlines()
    ]


def test_the_report_is_the_one_shown():
    shown = re.search(r"(BN108 warning: .*?)```", README, flags=re.DOTALL)[1]
    shown = shown.replace("72 forward passes", "6 forward passes")  # one epoch, not twelve
    command = ["run", "examples/digits.py", "--epochs", "1", "--forget-eval"]
    result = subprocess.run(
        [sys.executable, "-m", "batchnorm", *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert shown.strip() in result.stderr


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

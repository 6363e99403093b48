"""From a finding to its repair: the auditor's fix, pasted into the script, ends the finding."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import batchnorm
from batchnorm.audit import RULES
from batchnorm.cli.commands import app

SCRIPT = Path(__file__).parent / "scripts" / "mistakes.py"
MADE, TRAINED = "# the model is made", "# training has ended"

MISTAKES = {
    "half frozen": ("BN102", MADE),
    "stale": ("BN103", TRAINED),
    "averaged": ("BN105", TRAINED),
    "checkpoint": ("BN107", MADE),
    "no eval": ("BN108", None),  # where the finding says
    "small": ("BN110", MADE),
    "accumulate": ("BN122", MADE),
}


def run(script: Path, mistake: str) -> dict:
    """The report of `batchnorm run`."""
    report = script.with_suffix(".json")
    done = CliRunner().invoke(app, ["run", "-o", str(report), str(script), mistake])
    assert done.exit_code == 0, done.output
    return json.loads(report.read_text())


def pasted(lines: list[str], fix: str, before: int) -> str:
    """The script with a line more, indented as the one that it stands before."""
    indent = lines[before][: len(lines[before]) - len(lines[before].lstrip())]
    return "\n".join([*lines[:before], indent + fix, *lines[before:]]) + "\n"


@pytest.mark.as_installed
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_suggested_repair_pasted_makes_the_second_report_clean(mistake, tmp_path):
    code, anchor = MISTAKES[mistake]
    lines = SCRIPT.read_text().splitlines()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.read_text())

    first = run(script, mistake)
    found = [finding for finding in first["findings"] if finding["code"] == code]
    assert found
    assert {finding["code"] for finding in first["findings"]} == {code}
    if anchor is None:
        before = int(found[0]["place"].rpartition(":")[2]) - 1
    else:
        before = next(n for n, line in enumerate(lines) if line.startswith(anchor))

    script.write_text(pasted(lines, found[0]["fix"], before))
    second = run(script, mistake)
    assert second["findings"] == []
    assert second["layers"] == first["layers"]


def suggested() -> list[tuple[str, str]]:
    """The calls that the rules' sources hand to `repair`, with a 4 for every number in them."""
    found = []
    for rule in RULES:
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(rule)))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "repair":
                call = node.args[0]
                parts = call.values if isinstance(call, ast.JoinedStr) else [call]
                text = "".join(
                    getattr(part, "value", "4") if isinstance(part, ast.Constant) else "4"
                    for part in parts
                )
                found.append((rule.code, text))
    return found


@pytest.mark.parametrize(("code", "text"), suggested())
def test_a_suggested_call_fits_the_repair_s_signature(code, text):
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    inspect.signature(getattr(batchnorm, call.func.id)).bind(*call.args, **given)


@pytest.mark.parametrize(
    "repair",
    [
        "accumulate",
        "adapt",
        "average",
        "convert",
        "fold",
        "freeze",
        "frozen_statistics",
        "parameter_groups",
        "port",
        "recalibrate",
        "rematerialize",
    ],
)
def test_every_repair_is_named_on_a_rule_s_page(repair):
    assert repair in batchnorm.__all__
    assert any(f"{repair}(" in rule.page() for rule in RULES)

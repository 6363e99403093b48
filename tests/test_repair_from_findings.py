"""From a finding to its repair: the auditor's fix, pasted into the script, ends the finding."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import batchnorm
from batchnorm import repair
from batchnorm.audit import RULES, Selection, audit, watch
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


# functions, not what they return; without those that measure or undo
REPAIRS = [n for n in repair.__all__ if n.islower() and n not in ("activation_memory", "unfreeze")]


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair_is_named_on_a_rule_s_page(name):
    assert name in batchnorm.__all__
    assert any(re.search(rf"\b{name}\(", rule.page()) for rule in RULES)


def images(n: int = 8, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6) + shift


def network(norm=nn.BatchNorm2d, **options) -> nn.Sequential:
    """A trained one: its statistics follow what its convolution gives, and γ and β differ."""
    options = {"bias": False, **options}
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **options), norm(4), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_()
    for batch in loader():
        model(batch)
    return model


def loader() -> list[torch.Tensor]:
    return [images() for _ in range(30)]


def changed(model: nn.Sequential, **statistics: float) -> nn.Sequential:
    for name, value in statistics.items():
        getattr(model[1], name).fill_(value)
    return model


def synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network())


def with_bias() -> nn.Module:
    return network(bias=True)


STILL = {
    "NaN in a mean": ("BN101", lambda: changed(network(), running_mean=float("nan"))),
    "statistics lost": ("BN106", lambda: changed(network(), running_mean=0.0, running_var=1.0)),
    "stale": ("BN103", lambda: changed(network(), running_mean=5.0)),
    "synchronized": ("BN115", synchronized),
    "half precision": ("BN121", lambda: network().half()),
    "cancelled bias": ("BN127", with_bias),
}


@pytest.mark.parametrize("mistake", STILL)
def test_what_an_audit_suggests_ends_its_finding(mistake):
    code, make = STILL[mistake]
    model = make()
    looks = None if code in ("BN101", "BN115", "BN121") else loader()

    def told() -> list[str]:
        findings = audit(model, looks, selection=Selection(select=(code,))).findings
        return [finding.fix for finding in findings if finding.code == code]

    (fix,) = told()
    exec(fix, {"model": model, "loader": loader(), "batch": images()})  # noqa: S102 - as pasted
    # γ and β in half precision are a fact that may be meant, and told as one
    assert [f for f in told() if f == fix] == ([fix] if code == "BN121" else [])
    if code == "BN121":
        assert model[1].running_mean.dtype == torch.float32


def test_decay_of_γ_and_β_ends_with_the_optimizer_s_groups_split():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def train() -> list[str]:
        with watch(model) as probe:
            for batch in loader():
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        return [f.fix for f in probe.report().findings if "decay" in f.message]

    (fix,) = train()
    exec(fix, {"model": model, "optimizer": optimizer})  # noqa: S102 - as pasted
    assert train() == []
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0.0]


def test_deployment_s_shift_is_taken_up_by_the_adaptation_that_is_suggested():
    model = network()
    there = [images(64, shift=2.0) for _ in range(8)]
    report = audit(model, loader(), deploy=there)
    fix = next(f.fix for f in report.findings if f.code == "BN126")
    model.eval()
    at_home, before = model[:2](images(64)).mean(), model[:2](there[0]).mean()
    exec(fix, {"model": model})  # noqa: S102 - as pasted
    after = [model[:2](batch) for batch in there][-1].mean()  # it remembers the stream
    assert (after - at_home).abs() < (before - at_home).abs() * 0.7  # the cap holds it


def test_the_fold_that_is_suggested_leaves_out_what_it_must():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.two, self.folds = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.one(x)
            return self.folds(self.two(self.norm(x) + x))

    model = Shortcut()
    (finding,) = [f for f in audit(model).findings if f.code == "BN119"]
    assert finding.modules == ("norm",)
    batch = images()
    expected = model.eval()(batch)
    exec(finding.fix, {"model": model, "batch": batch})  # noqa: S102 - as pasted
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert isinstance(model.folds, nn.Identity)
    torch.testing.assert_close(model(batch), expected)

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.audit import Finding, Probe, Selection, Severity, audit

GUESS = Finding("BN117", Severity.INFO, "momentum 0.99", ("a",), "0.01", is_guess=True)
FACT = Finding("BN108", Severity.WARNING, "moved", ("Net.a",), "eval()")


@pytest.mark.parametrize(
    ("select", "ignore", "code", "looks"),
    [
        ((), (), "BN108", True),
        (("BN108",), (), "BN108", True),
        (("BN108",), (), "BN109", False),
        (("BN10",), (), "BN109", True),
        (("BN10",), (), "BN118", False),
        (("BN",), ("BN12",), "BN124", False),
        (("BN124",), ("BN12",), "BN124", False),  # what is ignored is ignored
        ((), ("BN124",), "BN123", True),
    ],
)
def test_rules_are_chosen_by_how_their_codes_begin(select, ignore, code, looks):
    assert Selection(select, ignore).looks(code) is looks


@pytest.mark.parametrize(
    ("pattern", "path", "left_out"),
    [
        ("backbone.*", "backbone.0.norm", True),
        ("backbone.*", "Net.backbone.0.norm", True),  # the model's own name may be left out
        ("Net.backbone.*", "Net.backbone.norm", True),
        ("*.norm", "backbone.0.norm", True),
        ("backbone", "backbone.0.norm", False),
        ("backbone.*", "head.norm", False),
        ("0", "0", True),
        ("?", "ab", False),
    ],
)
def test_modules_are_chosen_as_files_are(pattern, path, left_out):
    selection = Selection(modules={pattern: ("BN102",)})
    assert selection.ignores("BN102", path) is left_out
    assert not selection.ignores("BN108", path)


def test_a_severity_leaves_out_what_is_less_bad():
    fact = Finding("BN127", Severity.INFO, "a bias", ("a",), "bias=False")
    kept = [[s.keeps(f) for f in (FACT, fact)] for s in map(of, Severity)]
    assert kept == [[False, False], [True, False], [True, True]]


def of(severity: Severity) -> Selection:
    return Selection(severity=severity)


def test_a_guess_is_for_those_who_name_its_rule():
    assert not Selection().keeps(GUESS)
    assert not Selection(select=("BN",)).keeps(GUESS)
    assert Selection(select=("BN117",)).keeps(GUESS)


def test_what_no_rule_begins_with_is_told():
    selection = Selection(("BN1", "BN9"), ("X",), modules={"a": ("BN108", "BM1")})
    assert selection.unknown(["BN108", "BN118"]) == ["BN9", "X", "BM1"]


def two_bad_norms() -> nn.Module:
    return nn.ModuleDict({"one": nn.BatchNorm1d(3, 0.1), "two": nn.BatchNorm1d(3, 0.1)})


def test_layers_that_are_left_out_are_not_counted_in_messages():
    (finding,) = audit(two_bad_norms()).findings
    assert (finding.modules, "in 2 layers" in finding.message) == (("one", "two"), True)
    (finding,) = audit(two_bad_norms(), selection=Selection(modules={"two": ("BN118",)})).findings
    assert (finding.modules, "in 1 layer" in finding.message) == (("one",), True)
    assert audit(two_bad_norms(), selection=Selection(modules={"*": ("BN11",)})).findings == ()


def test_a_run_is_watched_by_the_rules_that_were_chosen(seeded):
    def run(selection: Selection) -> list[tuple[str, tuple[str, ...]]]:
        layer = nn.BatchNorm1d(3, momentum=0.001)
        with Probe(selection=selection) as probe:
            for _ in range(40):
                layer(torch.randn(8, 3) + 5)
            with torch.no_grad():
                layer(torch.randn(8, 3))
        report = probe.report()
        assert report.disabled == {}
        return [(finding.code, finding.modules) for finding in report.findings]

    both = [("BN103", ("BatchNorm1d",)), ("BN108", ("BatchNorm1d",))]
    assert run(Selection()) == both
    assert run(Selection(select=("BN108",))) == both[1:]
    assert run(Selection(ignore=("BN108",))) == both[:1]
    assert run(Selection(severity=Severity.ERROR)) == []
    assert run(Selection(modules={"BatchNorm1d": ("BN108",)})) == both[:1]
    assert run(Selection(modules={"*": ("BN103",)})) == both[1:]

"""Reports of several ranks, sent and made one."""

from __future__ import annotations

import dataclasses
import math

import torch

from batchnorm.audit import RULES, Finding, Report, Rule, Selection, Severity
from batchnorm.audit.finding import Ending
from batchnorm.audit.merging import merged
from batchnorm.audit.rank_view import Calls, LayerView, RankView, RankViews, told
from batchnorm.audit.wire import (
    MOST_FINDINGS,
    Note,
    packed,
    packed_statistics,
    unpacked,
    unpacked_statistics,
)
from batchnorm.ranks.store import LARGEST
from reports import FAILED, WARNED, hostile, measured, report, stale


def together(*reports: Report, by: int = 0, size: int = 0, **options) -> Report:
    numbered = dict(enumerate(reports))
    views = [RankView(rank) for rank in numbered]
    ranks = RankViews(size or len(reports), views)
    return merged(numbered, by, ranks, [], Selection(), **options)


def test_equal_findings_are_told_once_and_others_with_their_ranks():
    fact = dataclasses.replace(WARNED, code="BN127", severity=Severity.INFO)
    it = together(
        report(WARNED, fact), report(FAILED, WARNED), report(WARNED, fact), report(WARNED)
    )
    assert it.findings == (
        dataclasses.replace(FAILED, ranks=(1,)),
        WARNED,
        dataclasses.replace(fact, ranks=(0, 2)),
    )
    assert it.ranks == 4


def test_a_measurement_differs_a_little_from_rank_to_rank():
    """Its numbers, and which layers are just beyond a limit; it is one finding."""
    many = dataclasses.replace(WARNED, code="BN110", modules=("Net.a", "Net.b", "Net.c"))
    few = dataclasses.replace(many, modules=("Net.c", "Net.a"), message="other numbers")
    other = dataclasses.replace(many, modules=("Net.d",))
    it = together(report(few, stale("x", 0.7, 0.1)), report(many, stale("x", 0.8, 0.1), other))
    assert it.findings == (stale("x", 0.7, 0.1), many, dataclasses.replace(other, ranks=(1,)))


def test_other_places_severities_and_layers_are_other_findings():
    at = dataclasses.replace(WARNED, place="train.py:99")
    worse = dataclasses.replace(WARNED, severity=Severity.ERROR)
    elsewhere = dataclasses.replace(WARNED, modules=("Net.z",))
    found = together(report(WARNED), report(at), report(worse), report(elsewhere)).findings
    assert sorted(finding.ranks for finding in found) == [(0,), (1,), (2,), (3,)]


def test_several_findings_of_a_layer_are_matched_by_their_words():
    one, two = (dataclasses.replace(FAILED, message=f"shape {i}") for i in (1, 2))
    it = together(report(one, two), report(two))
    assert it.findings == (dataclasses.replace(one, ranks=(0,)), two)


def test_findings_without_layers_are_told_once_too():
    bare = dataclasses.replace(WARNED, modules=())
    assert together(report(bare), report(bare)).findings == (bare,)
    assert len(together(report(bare), report(WARNED)).findings) == 2


def test_the_rest_is_of_the_rank_that_reports_and_the_most_of_any():
    first = dataclasses.replace(report(), layers=0, calls=0, rules=("BN103",))
    second = dataclasses.replace(measured(), findings=(), disabled={"BN104": "KeyError: 1"})
    third = report(disabled={"BN103": "ValueError: x"})
    endings = (Ending(0, "exit status 1"),)
    it = together(first, second, third, by=1, size=5, endings=endings)
    assert it.profiles == second.profiles
    assert it.timeline == second.timeline
    assert (it.layers, it.calls) == (second.layers, second.calls)
    assert it.rules == tuple(sorted({*first.rules, *second.rules, *third.rules}))
    assert it.disabled == {"BN104": "KeyError: 1", "BN103": "ValueError: x, on rank 2"}
    assert (it.ranks, it.endings) == (5, endings)


class Counts(Rule):
    code, name, looks_at = "XY1", "counts ranks", "ranks"

    def confront(self, ranks):
        if ranks.size == 3:
            raise LookupError("three")
        yield self.found(Severity.WARNING, f"{ranks.size} ranks", (), "none")


def test_rules_that_look_at_ranks_are_asked():
    def asked(size: int, **options) -> Report:
        ranks = RankViews(size, [RankView(0)])
        return merged({0: report()}, 0, ranks, [Counts, *RULES], Selection(**options))

    it = asked(2)
    assert [finding.message for finding in it.findings] == ["2 ranks"]
    assert {"XY1", "BN112", "BN114"} <= set(it.rules)
    assert asked(2, ignore=("XY1",)).findings == ()
    assert "BN112" not in asked(2, select=("XY1",)).rules
    assert asked(3).disabled == {"XY1": "LookupError: three"}


# Sent


def view() -> RankView:
    layers = (LayerView("Net.bn", "Net.bn", 1e-5, "γ", "a", "b", 3, True, (0, 1), False, 4),)
    calls = (Calls("0", (0, 1), {"Net.bn": 3}, ("Net.bn",) * 3),)
    return RankView(1, layers, calls, status=None)


def test_a_note_comes_back_without_what_one_rank_tells():
    for sent in (report(WARNED, FAILED, disabled={"BN103": "KeyError: γ"}), measured(), hostile()):
        finding = dataclasses.replace(WARNED, ranks=(1, 2), is_guess=True)
        sent = dataclasses.replace(sent, findings=(*sent.findings, finding))
        came = unpacked(packed(Note(view(), sent, "train.py:3")))
        assert (came.view, came.place) == (view(), "train.py:3")
        bare = dataclasses.replace(sent, profiles=(), timeline=(), endings=())
        assert repr(came.report) == repr(bare)  # NaN is not itself


def test_a_note_has_a_limit_and_keeps_the_worst(monkeypatch):
    long = [dataclasses.replace(WARNED, fix=f"{i} ") for i in range(MOST_FINDINGS + 10)]
    layers = tuple(dataclasses.replace(view().layers[0], held=f"{i:016x}") for i in range(400))
    big = Note(dataclasses.replace(view(), layers=layers), report(FAILED, *long))
    assert unpacked(packed(big)) == big
    monkeypatch.setattr("batchnorm.audit.wire.LARGEST", len(packed(big)) - 1)
    came = unpacked(packed(big))
    assert len(packed(big)) < LARGEST
    assert came.report.findings == big.report.findings[:MOST_FINDINGS]
    assert (came.view.rank, came.view.status, came.view.layers) == (1, None, ())


def test_statistics_come_back_to_the_bit_and_have_a_limit():
    pairs = dict(told((torch.randn(5), torch.rand(5))) for _ in range(3))
    pairs |= dict([told((torch.tensor([math.nan, -0.0]), torch.ones(2)))])
    came = unpacked_statistics(packed_statistics(pairs))
    assert came.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert told(came[name])[0] == name
        for ours, theirs in zip(came[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    wide = dict(told((torch.full((2**18,), float(i)), torch.ones(2**18))) for i in range(4))
    data = packed_statistics(wide)
    assert len(data) <= LARGEST
    assert list(unpacked_statistics(data)) == list(wide)[:1]
    assert unpacked_statistics(packed_statistics({})) == {}


def test_a_finding_of_one_rank_alone():
    assert together(report(WARNED)).findings == (WARNED,)
    assert isinstance(together(report(WARNED)).findings[0], Finding)

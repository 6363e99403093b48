"""One report of what several ranks found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from batchnorm.audit.finding import Ending, Finding, Report
from batchnorm.audit.judge import Look, judge, views_for
from batchnorm.audit.rank_view import RankViews
from batchnorm.audit.rule import Rule
from batchnorm.audit.selection import Selection

__all__ = ["merged"]


def merged(
    reports: Mapping[int, Report],
    by: int,
    views: RankViews,
    rules: Iterable[type[Rule]],
    selection: Selection,
    endings: Sequence[Ending] = (),
) -> Report:
    """One report of all ranks', with what is found between them.

    Findings that several ranks have are told once: those of one rule, severity and place that
    name a layer in common. Of them the one that names most layers is told.

    - `reports`: by rank, of those that have one.
    - `by`: the rank of which measurements and timeline are told.
    - `views`: what the ranks told of themselves.
    - `rules`: those of them that look at ranks are asked.
    """
    disabled: dict[str, str] = {}
    for rank, report in sorted(reports.items()):
        for code, reason in report.disabled.items():
            disabled.setdefault(code, reason if rank == by else f"{reason}, on rank {rank}")
    looks: list[Look] = [
        (rule, partial(rule.confront, views_for(rule.code, views, selection)))
        for rule in (kind() for kind in rules if selection.looks(kind.code))
        if type(rule).confront is not Rule.confront
    ]
    findings = [*_told_once(reports), *judge(looks, selection, disabled)]
    codes = (code for report in reports.values() for code in report.rules)
    return replace(
        reports[by],
        findings=tuple(sorted(findings, key=lambda f: (f.severity.rank, f.code, f.modules))),
        layers=max(report.layers for report in reports.values()),
        calls=max(report.calls for report in reports.values()),
        rules=tuple(sorted({*codes, *(rule.code for rule, _ in looks)})),
        disabled=disabled,
        ranks=views.size,
        endings=tuple(endings),
    )


_KIND = ("code", "severity", "place", "is_guess")


@dataclass
class _Told:
    """Findings that are one: by the rank that has each."""

    by: dict[int, Finding] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)  # sets, for there may be thousands of ranks
    modules: set[str] = field(default_factory=set)
    lists: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, rank: int, finding: Finding) -> None:
        """Another rank's finding."""
        self.by[rank] = finding
        self.words.add(repr(finding))
        self.modules.update(finding.modules)
        self.lists.add(finding.modules)

    def is_of(self, finding: Finding) -> bool:
        """Whether another rank's finding is the same one, seen from there."""
        own = next(iter(self.by.values()))
        if any(getattr(finding, name) != getattr(own, name) for name in _KIND):
            return False
        return finding.modules in self.lists or not self.modules.isdisjoint(finding.modules)

    def finding(self, ranks: Iterable[int]) -> Finding:
        """The one that names most layers, with the ranks that have it if not all do."""
        rank = max(self.by, key=lambda rank: (len(self.by[rank].modules), -rank))
        own = tuple(sorted(self.by))
        return replace(self.by[rank], ranks=() if own == tuple(ranks) else own)


def _told_once(reports: Mapping[int, Report]) -> list[Finding]:
    told: list[_Told] = []
    for rank, report in sorted(reports.items()):
        # a finding that another has to the word is that one before it is one that resembles it
        rest = []
        for finding in report.findings:
            words = repr(finding)
            one = next((t for t in told if rank not in t.by and words in t.words), None)
            if one is None:
                rest.append(finding)
            else:
                one.add(rank, finding)
        for finding in rest:
            one = next((t for t in told if rank not in t.by and t.is_of(finding)), None)
            if one is None:
                told.append(one := _Told())
            one.add(rank, finding)
    return [one.finding(sorted(reports)) for one in told]

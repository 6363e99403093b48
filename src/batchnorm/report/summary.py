"""What a report says first, and the order in which it says the rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from batchnorm.audit import Finding, Report
from batchnorm.audit.finding import ranks_named

__all__ = ["count", "endings", "grouped", "headline", "looked", "on_ranks"]


def count(number: int, thing: str, things: str | None = None) -> str:
    """`1 layer`, `7 layers`."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def headline(report: Report) -> str:
    """What was looked at, in a few words."""
    layers = count(report.layers, "layer")
    if report.subject is not None:
        subject = report.subject
        if report.layers == 0 and report.findings:  # of its operations alone
            return f"batchnorm read {subject}"
        if report.layers == 0:
            return f"batchnorm found no batch norm layer in {subject}"
        ran = "" if report.calls == 0 else f" in {report.calls} batches"
        return f"batchnorm checked {layers} of {subject}{ran}{_each(report)}"
    if report.layers == 0:
        return f"batchnorm saw no batch norm layer being called{_each(report)}"
    passes = count(report.calls, "forward pass", "forward passes")
    return f"batchnorm watched {layers} in {passes}{_each(report)}"


def _each(report: Report) -> str:
    if report.ranks <= 1:
        return ""
    if report.endings:  # they were not alike to the end
        return f" on the rank that reports, of {report.ranks}"
    return f" on each of {report.ranks} ranks"


def on_ranks(finding: Finding, report: Report) -> str | None:
    """`rank 3 of 4`; None for what all ranks have."""
    return f"{ranks_named(finding.ranks)} of {report.ranks}" if finding.ranks else None


def endings(report: Report) -> list[str]:
    """A line for ranks that did not end well, alike in how and where."""
    alike: dict[tuple[str, str | None], list[int]] = {}
    for ending in report.endings:
        alike.setdefault((ending.how, ending.place), []).append(ending.rank)
    return [
        f"{ranks_named(ranks)} of {report.ranks}: {how}" + (f", at {place}" if place else "")
        for (how, place), ranks in alike.items()
    ]


def looked(report: Report) -> list[str]:
    """Codes of the rules that looked to the end."""
    return [code for code in report.rules if code not in report.disabled]


def grouped(findings: tuple[Finding, ...]) -> Iterator[list[Finding]]:
    """The findings of one rule and one severity together, the worst first."""
    first: dict[tuple[int, str], int] = {}
    for number, finding in enumerate(findings):
        first.setdefault((finding.severity.rank, finding.code), number)

    def key(finding: Finding) -> tuple[int, int]:
        rank = finding.severity.rank
        return rank, first[rank, finding.code]

    for _, group in groupby(sorted(findings, key=key), key=key):
        yield list(group)

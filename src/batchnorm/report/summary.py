"""What a report says first, and the order in which it says the rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from batchnorm.audit import Finding, Report

__all__ = ["count", "grouped", "headline", "looked"]


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
        return f"batchnorm checked {layers} of {subject}{ran}"
    if report.layers == 0:
        return "batchnorm saw no batch norm layer being called"
    return f"batchnorm watched {layers} in {count(report.calls, 'forward pass', 'forward passes')}"


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

"""A report as workflow commands: GitHub Actions shows each finding beside its line."""

from __future__ import annotations

from batchnorm.audit import Finding, Report, Severity
from batchnorm.report.place import Place
from batchnorm.report.summary import endings, grouped, on_ranks
from batchnorm.report.visible import visible

__all__ = ["to_github"]

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def to_github(report: Report) -> str:
    """One line for each finding, the worst first, and for each rule that was switched off.

        ::error file=train.py,line=12,title=BN109%3A one value per channel::an input of …

    Printed in a workflow's step, they become annotations. Nothing for a report without findings.
    """
    findings = (finding for group in grouped(report.findings) for finding in group)
    off = (
        _command("notice", {"title": f"{code} was switched off"}, [reason])
        for code, reason in report.disabled.items()
    )
    ended = (
        _command("notice", {"title": "a rank that did not end well"}, [text])
        for text in endings(report)
    )
    return "".join([*(_annotation(finding, report) for finding in findings), *off, *ended])


def _annotation(finding: Finding, report: Report) -> str:
    properties: dict[str, str] = {}
    place = Place.parse(finding.place)
    if place is not None:
        properties |= {"file": place.file, "line": str(place.line)}
    properties["title"] = f"{finding.code}: {finding.name}" if finding.name else finding.code
    lines = [finding.message]
    if finding.modules:
        lines.append(f"in {', '.join(finding.modules)}")
    if finding.place is not None and place is None:
        lines.append(f"at {finding.place}")
    if own := on_ranks(finding, report):
        lines.append(f"on {own}")
    return _command(
        _COMMANDS[finding.severity], properties, [*lines, *f"fix: {finding.fix}".splitlines()]
    )


def _command(name: str, properties: dict[str, str], lines: list[str]) -> str:
    given = ",".join(f"{key}={_property(visible(value))}" for key, value in properties.items())
    data = "\n".join(visible(line) for line in lines)
    return f"::{name} {given}::{_data(data)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

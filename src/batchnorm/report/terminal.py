"""A report as text for a terminal: worst first, each finding with its place and its fix."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from batchnorm.audit import Finding, Report, Severity
from batchnorm.report.summary import endings, grouped, headline, looked, on_ranks
from batchnorm.report.visible import visible

__all__ = ["print_report"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold blue"}
_SHOWN = 4  # layers named before "and so many more"


def print_report(report: Report, console: Console) -> None:
    """Print what was watched, then every finding; those of one rule together."""

    def line(text: str, style: str = "") -> None:
        # text, not markup: module names and paths are the user's; unwrapped, to be copied
        console.print(Text(visible(text), style=style), soft_wrap=True)

    line("")
    if report.layers == 0:
        line(headline(report), "bold")
        if report.subject is None:
            line("  functions that are compiled, and other processes, are not seen")
    elif report.findings:
        line(f"{headline(report)}: {len(report.findings)} found", "bold")
    else:
        line(f"{headline(report)}: nothing found by {', '.join(looked(report))}", "bold green")
    if report.graph is not None:
        line(f"  graph read by {report.graph}")
    for text in endings(report):
        line(f"  {text}", "magenta")
    for group in grouped(report.findings):
        line("")
        first = group[0]
        times = "" if len(group) == 1 else f", {len(group)} times"
        head = f"{first.code} {first.severity.value}: {first.name}{times}"
        line(head, _STYLES[first.severity])
        for text in _body(group, report):
            line(f"  {text}" if text else "")
    for code, reason in report.disabled.items():
        line(f"{code} was switched off and the run went on: {reason}", "magenta")


def _body(group: list[Finding], report: Report) -> list[str]:
    fixes = {finding.fix for finding in group}
    lines: list[str] = []
    for finding in group:
        lines += _found(finding, report)
        if len(fixes) > 1:
            lines += _fix(finding)
        if len(group) > 1:
            lines.append("")
    if len(fixes) == 1:
        lines += _fix(group[0])
    return [*lines, f"why  batchnorm rules {group[0].code}"]


def _found(finding: Finding, report: Report) -> list[str]:
    shown = finding.modules[:_SHOWN]
    more = len(finding.modules) - len(shown)
    layers = ", ".join(shown) + (f" and {more} more" if more else "")
    place = [] if finding.place is None else [f"at   {finding.place}"]
    ranks = [f"on   {own}"] if (own := on_ranks(finding, report)) else []
    return [finding.message, *([f"in   {layers}"] if layers else []), *place, *ranks]


def _fix(finding: Finding) -> list[str]:
    first, *others = finding.fix.splitlines() or [""]
    return [f"fix  {first}", *(f"     {other}" for other in others)]

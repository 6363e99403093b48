"""A report as text for a terminal: worst first, each finding with its place and its fix."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from batchnorm.audit import Finding, Report, Severity

__all__ = ["print_report"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold blue"}
_SHOWN = 4  # layers named before "and so many more"


def print_report(report: Report, console: Console) -> None:
    """Print what was watched, then every finding."""

    def line(text: str, style: str = "") -> None:
        # text, not markup: module names and paths are the user's; unwrapped, to be copied
        console.print(Text(text, style=style), soft_wrap=True)

    layers = "1 layer" if report.layers == 1 else f"{report.layers} layers"
    passes = "1 forward pass" if report.calls == 1 else f"{report.calls} forward passes"
    watched = f"batchnorm watched {layers} in {passes}"
    if report.subject is not None:
        ran = "" if report.calls == 0 else f" in {report.calls} batches"
        watched = f"batchnorm checked {layers} of {report.subject}{ran}"
    line("")
    if report.layers == 0 and report.subject is not None:
        line(f"batchnorm found no batch norm layer in {report.subject}", "bold")
    elif report.layers == 0:
        line("batchnorm saw no batch norm layer being called", "bold")
        line("  compiled models and other processes are not seen")
    elif report.findings:
        line(f"{watched}: {len(report.findings)} found", "bold")
    else:
        looked = ", ".join(code for code in report.rules if code not in report.disabled)
        line(f"{watched}: nothing found by {looked}", "bold green")
    for finding in report.findings:
        line("")
        head = f"{finding.code} {finding.severity.value}: {finding.name}"
        line(head, _STYLES[finding.severity])
        for text in _body(finding):
            line(f"  {text}")
    for code, reason in report.disabled.items():
        line(f"{code} was switched off and the run went on: {reason}", "magenta")


def _body(finding: Finding) -> list[str]:
    shown = finding.modules[:_SHOWN]
    more = len(finding.modules) - len(shown)
    layers = ", ".join(shown) + (f" and {more} more" if more else "")
    place = [] if finding.place is None else [f"at   {finding.place}"]
    return [
        finding.message,
        f"in   {layers}",
        *place,
        f"fix  {finding.fix}",
        f"why  batchnorm rules {finding.code}",
    ]

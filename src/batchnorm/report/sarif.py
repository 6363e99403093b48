"""A report as SARIF 2.1.0, which code-scanning services and editors read."""

from __future__ import annotations

import json
import re
from typing import Any

from batchnorm import __version__
from batchnorm.audit import Finding, Report, Rule, Severity, find_rule
from batchnorm.report.json import finite
from batchnorm.report.place import Place
from batchnorm.report.summary import endings, grouped, on_ranks
from batchnorm.report.visible import visible

__all__ = ["to_sarif"]

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def to_sarif(report: Report) -> str:
    """One run: the rules that looked, a result for each finding, the worst first.

    A result has its modules as logical locations and, where the place is `file:line`, a physical
    one. Repairs are words and calls, not edits to apply, so they stand in the message and in the
    result's properties. A rule that was switched off is a notification of the invocation.
    """
    findings = [finding for group in grouped(report.findings) for finding in group]
    named = {finding.code: finding.name for finding in findings}
    rules = {code: i for i, code in enumerate(dict.fromkeys([*report.rules, *named]))}
    driver = {
        "name": "batchnorm",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_descriptor(code, named.get(code, "")) for code in rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    *(_notification(code, why, rules) for code, why in report.disabled.items()),
                    *({"level": "warning", "message": {"text": _text(t)}} for t in endings(report)),
                ],
            }
        ],
        "results": [_result(finding, rules[finding.code], report) for finding in findings],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "layers": report.layers,
            "calls": report.calls,
            "subject": report.subject,
            "graph": report.graph,
            "ranks": report.ranks,
        },
    }
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, allow_nan=False) + "\n"


def _descriptor(code: str, name: str) -> dict[str, Any]:
    rule = _rule(code)
    if rule is None:
        return {"id": code, "shortDescription": {"text": name or code}}
    page = rule.page()
    return {
        "id": code,
        "name": rule.__name__,
        "shortDescription": {"text": rule.name},
        "fullDescription": {"text": _what_it_finds(page) or rule.name},
        "help": {"text": page, "markdown": page},
        "properties": {"looksAt": rule.looks_at},
    }


def _rule(code: str) -> type[Rule] | None:
    try:
        return find_rule(code)
    except KeyError:
        return None  # somebody else's


def _what_it_finds(page: str) -> str:
    found = re.search(r"^## What it finds\n+(.*?)(?=\n\n|\Z)", page, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _result(finding: Finding, index: int, report: Report) -> dict[str, Any]:
    own = on_ranks(finding, report)
    message = finding.message + (f", on {own}" if own else "")
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": _text(f"{message}. Fix: {finding.fix}")},
    }
    location: dict[str, Any] = {}
    place = Place.parse(finding.place)
    if place is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": place.uri},
            "region": {"startLine": place.line},
        }
    if finding.modules:
        location["logicalLocations"] = [_module(path) for path in finding.modules]
    if location:
        result["locations"] = [location]
    result["properties"] = {
        "fix": finding.fix,
        "place": finding.place,
        "numbers": finite(finding.numbers),
        "ranks": list(finding.ranks),
    }
    return result


def _module(path: str) -> dict[str, str]:
    shown = visible(path)
    return {"name": shown.rpartition(".")[2], "fullyQualifiedName": shown, "kind": "member"}


def _notification(code: str, reason: str, rules: dict[str, int]) -> dict[str, Any]:
    rule = {"id": code, "index": rules[code]} if code in rules else {"id": code}
    text = _text(f"{code} was switched off and the run went on: {reason}")
    return {"level": "warning", "associatedRule": rule, "message": {"text": text}}


def _text(message: str) -> str:
    """Plain text in SARIF: `{0}` would be a placeholder (§3.11.5), `[a](b)` a link (§3.11.6)."""
    text = "\n".join(visible(line) for line in message.splitlines())
    return text.replace("{", "{{").replace("}", "}}").replace("](", "\\](")

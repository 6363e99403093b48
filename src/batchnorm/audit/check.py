"""Check what lies still: checkpoints and models, by the rules that look at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from batchnorm.audit.finding import Finding, Report
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES
from batchnorm.audit.state import State

__all__ = ["check"]


def check(states: Iterable[State], rules: Iterable[type[Rule]] = RULES) -> Report:
    """What the rules find in these states, worst first; nothing of them changes."""
    states = list(states)
    looking = [rule() for rule in rules if rule.examine is not Rule.examine]
    findings: list[Finding] = []
    disabled: dict[str, str] = {}
    with torch.no_grad():
        for rule in looking:
            try:
                for state in states:
                    found = rule.examine(state)
                    findings.extend(found if len(states) == 1 else _named(found, state))
            except Exception as error:
                disabled[rule.code] = f"{type(error).__name__}: {error}"
    findings.sort(key=lambda f: (f.severity.rank, f.code, f.modules))
    return Report(
        tuple(findings),
        layers=sum(len(state.layers) for state in states),
        calls=0,
        rules=tuple(rule.code for rule in looking),
        disabled=disabled,
        subject=", ".join(state.name for state in states),
    )


def _named(findings: Iterable[Finding], state: State) -> Iterator[Finding]:
    """The findings with the state's name before each layer's, where there are several states."""
    for finding in findings:
        modules = tuple(f"{state.name}: {path}" for path in finding.modules)
        yield replace(finding, modules=modules)

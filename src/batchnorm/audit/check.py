"""Check what lies still: checkpoints and models, and what batches do in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm.audit.evidence import Evidence, Forward, gather
from batchnorm.audit.finding import Finding, Report
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES
from batchnorm.audit.state import State, state_of

__all__ = ["audit", "check"]


def audit(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    rules: Iterable[type[Rule]] = RULES,
    name: str | None = None,
) -> Report:
    """Look at a model, and at what batches do in it; the model is left exactly as it was.

    ```python
    audit(model).findings                        # what its layers alone tell
    audit(model, loader)                         # and what they are given in training mode
    audit(model, loader, forward=lambda model, batch: model(batch["image"], batch["age"]))
    ```

    - `batches`: tensors, tuples (of which the first entry is the input), dictionaries or
      dataclasses (whose entries are the model's arguments by name); up to 32 are looked at.
    - `forward(model, batch)`: how to call the model, where that does not fit.
    - `rules`: those that look; by default all that look at a model or at batches.
    - `name`: what the report calls the model; by default its class.

    Modes of every module, buffers, random state, hooks and gradients are what they were, also
    where the model raises.

    Raises what the model raises, and `ValueError` for an iterable without batches.
    """
    state = state_of(model, name or type(model).__name__)
    evidence = None if batches is None else gather(model, batches, forward)
    return check([state], rules, evidence)


def check(
    states: Iterable[State],
    rules: Iterable[type[Rule]] = RULES,
    evidence: Evidence | None = None,
) -> Report:
    """What the rules find in these states and in the evidence, worst first."""
    states, rules = list(states), list(rules)
    findings: list[Finding] = []
    disabled: dict[str, str] = {}
    looked = []
    for kind in rules:
        rule = kind()
        looks: list[Callable[[], Iterable[Finding]]] = []
        if kind.examine is not Rule.examine:
            looks.append(lambda rule=rule: _examined(rule, states))  # type: ignore[misc]
        if kind.weigh is not Rule.weigh and evidence is not None:
            looks.append(lambda rule=rule: rule.weigh(evidence))  # type: ignore[misc]
        if looks:
            looked.append(rule.code)
        try:
            with torch.no_grad():
                for look in looks:
                    findings.extend(look())
        except Exception as error:
            disabled[rule.code] = f"{type(error).__name__}: {error}"
    findings.sort(key=lambda f: (f.severity.rank, f.code, f.modules))
    return Report(
        tuple(findings),
        layers=sum(len(state.layers) for state in states),
        calls=0 if evidence is None else evidence.batches,
        rules=tuple(looked),
        disabled=disabled,
        subject=", ".join(state.name for state in states),
    )


def _examined(rule: Rule, states: list[State]) -> Iterator[Finding]:
    """The rule's findings, with the state's name before each layer's where there are several."""
    for state in states:
        for finding in rule.examine(state):
            if len(states) > 1:
                modules = tuple(f"{state.name}: {path}" for path in finding.modules)
                finding = replace(finding, modules=modules)
            yield finding

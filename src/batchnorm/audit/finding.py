"""What a rule says: findings, and the report that gathers them."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from enum import Enum

from batchnorm.audit.profile import LayerProfile, Period

__all__ = ["Finding", "Report", "Severity", "in_layers"]


class Severity(str, Enum):
    """How bad: `error` is certainly wrong, `warning` does harm, `info` may be meant."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in one place.

    - `code`, `name`: the rule's code, and what it finds in a few words.
    - `message`: one line, with the numbers that were measured.
    - `modules`: paths of the layers concerned.
    - `place`: `file:line` in the user's code, where that is known.
    - `fix`: what to write or call.
    - `numbers`: the measurements by name, for programs.
    - `is_guess`: whether it may well be meant; guesses are told to those who ask for the rule.
    """

    code: str
    severity: Severity
    message: str
    modules: tuple[str, ...]
    fix: str
    place: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    name: str = ""
    is_guess: bool = False


@dataclass(frozen=True)
class Report:
    """What an audit found, worst first, and what it looked at.

    - `layers`, `calls`: batch norm layers watched, and their forward passes.
    - `rules`: codes of the rules that looked.
    - `disabled`: rules that raised and were switched off, with the reason.
    - `subject`: the checkpoints or the model that were checked; None for a watched run.
    - `graph`: what read the model's graph for the rules that need one, such as `torch.fx`.
    - `profiles`: what was measured of each layer, in the order of their first calls.
    - `timeline`: a watched run's modes, in the order in which they came.
    """

    findings: tuple[Finding, ...]
    layers: int
    calls: int
    rules: tuple[str, ...]
    disabled: dict[str, str] = field(default_factory=dict)
    subject: str | None = None
    graph: str | None = None
    profiles: tuple[LayerProfile, ...] = ()
    timeline: tuple[Period, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether there is neither a warning nor an error."""
        return all(finding.severity is Severity.INFO for finding in self.findings)


def in_layers(paths: Sized) -> str:
    """`in 1 layer`, `in 12 layers`: the end of a message about all of them."""
    return "in 1 layer" if len(paths) == 1 else f"in {len(paths)} layers"

"""What a rule says: findings, and the report that gathers them."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby

from batchnorm.audit.profile import LayerProfile, Period

__all__ = ["Ending", "Finding", "Report", "Severity", "in_layers", "ranks_named"]


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
    - `ranks`: those of several that have it; none where all have.
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
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How a rank ended that did not end well, or that nothing was heard of it.

    - `place`: `file:line` in the user's code where it stood, where that is known.
    """

    rank: int
    how: str
    place: str | None = None


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
    - `ranks`: how many ranks it is about; layers, calls, profiles and timeline are those of one.
    - `endings`: of ranks that did not end well.
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
    ranks: int = 1
    endings: tuple[Ending, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether there is neither a warning nor an error."""
        return all(finding.severity is Severity.INFO for finding in self.findings)


def in_layers(paths: Sized) -> str:
    """`in 1 layer`, `in 12 layers`: the end of a message about all of them."""
    return "in 1 layer" if len(paths) == 1 else f"in {len(paths)} layers"


def ranks_named(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0 and 2`, `ranks 0–5 and 7`."""
    runs: list[str] = []
    numbered = enumerate(sorted(ranks))
    for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0]):
        own = [rank for _, rank in run]
        runs += [f"{own[0]}–{own[-1]}"] if len(own) > 2 else map(str, own)
    if len(runs) == 1:
        return f"{'ranks' if '–' in runs[0] else 'rank'} {runs[0]}"
    return f"ranks {', '.join(runs[:-1])} and {runs[-1]}"

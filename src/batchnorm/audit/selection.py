"""Which rules somebody wants to hear, how bad things have to be, and where not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from batchnorm.audit.finding import Finding, Severity

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """A choice of rules by code, or by how a code begins: `BN108`, `BN10`, `BN`.

    - `select`: the rules that look; all of them where it is empty.
    - `ignore`: those of them that do not.
    - `severity`: findings less bad than this are left out.
    - `modules`: by a pattern of module paths, the rules that do not look there, such as
      `{"backbone.*": ("BN102",)}`. Patterns are those of file names; the model's own name may be
      left out.

    A guess is reported only where its rule was selected by its whole code.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    severity: Severity = Severity.INFO
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def looks(self, code: str) -> bool:
        """Whether the rule with this code looks at all."""
        return (not self.select or _begins(code, self.select)) and not _begins(code, self.ignore)

    def ignores(self, code: str, path: str) -> bool:
        """Whether the rule leaves out the layer at a path."""
        below = path.partition(".")[2] or path
        return any(
            _begins(code, codes) and (fnmatchcase(path, pattern) or fnmatchcase(below, pattern))
            for pattern, codes in self.modules.items()
        )

    def keeps(self, finding: Finding) -> bool:
        """Whether a finding is bad enough, and no guess that nobody asked for."""
        if finding.is_guess and finding.code not in self.select:
            return False
        return finding.severity.rank <= self.severity.rank

    def unknown(self, codes: Iterable[str]) -> list[str]:
        """What was selected or ignored and begins none of these codes."""
        codes = tuple(codes)
        named = (*self.select, *self.ignore, *(c for many in self.modules.values() for c in many))
        return [name for name in named if not any(code.startswith(name) for code in codes)]


def _begins(code: str, names: Iterable[str]) -> bool:
    return any(code.startswith(name) for name in names)

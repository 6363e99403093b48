"""What to report, from the command line and from `[tool.batchnorm]` in pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from batchnorm.audit import RULES, Selection, Severity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["selection_from"]

_KEYS = ("select", "ignore", "severity", "per-module-ignores")


def selection_from(
    select: list[str] | None, ignore: list[str] | None, severity: Severity | None
) -> Selection:
    """What the command line says; what it leaves open, the nearest pyproject.toml above says.

    ```toml
    [tool.batchnorm]
    select = ["BN1"]
    ignore = ["BN127"]
    severity = "warning"
    per-module-ignores = { "backbone.*" = ["BN102"] }
    ```

    Raises `ValueError` for a setting that is none, and for codes that no rule begins with.
    """
    settings, file = _settings(Path.cwd())
    try:
        chosen = Selection(
            _split(select) if select else _codes(settings, "select"),
            _split(ignore) if ignore else _codes(settings, "ignore"),
            severity or _severity(settings.get("severity", Severity.INFO.value)),
            _modules(settings.get("per-module-ignores", {})),
        )
    except ValueError as error:
        raise ValueError(f"{file}: [tool.batchnorm] {error}") from error
    unknown = chosen.unknown(rule.code for rule in RULES)
    if unknown:
        raise ValueError(
            f"no rule's code begins with {', '.join(unknown)}; `batchnorm rules` lists them"
        )
    return chosen


def _settings(folder: Path) -> tuple[Mapping[str, Any], Path | None]:
    """The table of the nearest pyproject.toml, and the file it is from."""
    for place in (folder, *folder.parents):
        file = place / "pyproject.toml"
        if not file.is_file():
            continue
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        tool = table.get("tool", {})
        settings = tool.get("batchnorm", {}) if isinstance(tool, dict) else tool
        if not isinstance(settings, dict):
            raise ValueError(f"{file}: [tool.batchnorm] is a table, got {settings!r}")
        unknown = [key for key in settings if key not in _KEYS]
        if unknown:
            raise ValueError(
                f"{file}: [tool.batchnorm] has no setting {', '.join(unknown)}; there are "
                f"{', '.join(_KEYS)}"
            )
        return settings, file
    return {}, None


def _split(given: Iterable[str]) -> tuple[str, ...]:
    """`--select BN108,BN109 --select BN12` as three codes."""
    codes = [code.strip().upper() for each in given for code in each.split(",")]
    return tuple(code for code in codes if code)


def _codes(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    codes = settings.get(key, [])
    if not isinstance(codes, list) or not all(isinstance(code, str) for code in codes):
        raise ValueError(f"{key} is a list of codes, got {codes!r}")
    return _split(codes)


def _severity(name: object) -> Severity:
    known = [severity.value for severity in Severity]
    if name not in known:
        raise ValueError(f"severity is one of {', '.join(known)}, got {name!r}")
    return Severity(name)


def _modules(table: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(table, dict):
        raise ValueError(f"per-module-ignores is a table of module patterns, got {table!r}")
    return {str(pattern): _codes(table, pattern) for pattern in table}

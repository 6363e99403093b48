"""Files the commands read and write."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["example", "write_atomically"]


def example(name: str) -> Path:
    """An example script: from the wheel, or from the checkout that an editable install shows."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "examples" / name
    return installed if installed.exists() else package.parents[1] / "examples" / name


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename into place: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

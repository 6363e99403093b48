"""Files the commands read and write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["example", "write_atomically"]


def example(name: str) -> Path:
    """An example script: from the wheel, or from the checkout that an editable install shows."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "examples" / name
    return installed if installed.exists() else package.parents[1] / "examples" / name


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename into place: readers see the old file or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

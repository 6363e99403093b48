"""Files the commands read and write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["example", "replacing", "write_atomically"]


def example(name: str) -> Path:
    """An example script: from the wheel, or from the checkout that an editable install shows."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "examples" / name
    return installed if installed.exists() else package.parents[1] / "examples" / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end, and not on failure.

    Readers see the old file or the whole new one.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # writers look at the suffix
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

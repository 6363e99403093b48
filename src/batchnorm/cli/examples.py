"""The example scripts that commands run."""

from __future__ import annotations

from pathlib import Path

__all__ = ["example"]


def example(name: str) -> Path:
    """An example script: from the wheel, or from the checkout that an editable install shows."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "examples" / name
    return installed if installed.exists() else package.parents[1] / "examples" / name

"""What a repair says of itself: a title, and a table of the layers it touched."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["counted", "listed", "shown", "table"]

SHOWN = 12  # rows; a network has hundreds of layers


def shown(path: str) -> str:
    """A layer's path as people read it; that of the model itself is empty."""
    return path or "the model"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The title, and under it columns of text; the first of many rows, and how many more.

    ```text
    Recalibration: 7 layers, 1,797 samples
      layer    mean moved  std
      1        0.31 σ      ×0.93
      2.norm1  0.02 σ      ×1.01
    ```
    """
    if not rows:
        return title
    printed = [head, *rows[:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*printed, strict=True)]
    lines = [title]
    for row in printed:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    if len(rows) > SHOWN:
        lines.append(f"  and {len(rows) - SHOWN} more")
    return "\n".join(lines)


def counted(number: int, one: str, many: str | None = None) -> str:
    """How many of something: `1 layer`, `1,200 layers`, `2 batches`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

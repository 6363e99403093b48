"""Marks in a chart along depth: points with their errors, boxes of quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from batchnorm.report.scale import number
from batchnorm.report.svg import TOP, Frame, element, middle

__all__ = ["Measured", "across", "box", "label", "points", "thickness"]


@dataclass(frozen=True)
class Measured:
    """One layer's value with its error; `is_harmful` where it is certainly too large."""

    number: int
    path: str
    value: float
    error: float
    is_harmful: bool = False

    @property
    def name(self) -> str:
        """Number and path."""
        return f"{self.number + 1} · {self.path}"

    def told(self, text: Callable[[float], str]) -> str:
        """The value and its error."""
        if not math.isfinite(self.value):
            return "not finite"
        return (
            text(self.value)
            if not self.error
            else f"{text(self.value)} ± {number(float(f'{self.error:.2g}'))}"
        )


def across(i: int, n: int) -> dict[str, str]:
    """The attributes of a line down at the i-th of n layers."""
    x = f"{middle(i, n):.3f}%"
    return {"x1": x, "x2": x}


def thickness(n: int) -> float:
    """How wide, in pixels, a column is where there are n of them."""
    return 11.0 if n <= 16 else 6.0 if n <= 60 else 2.6


def label(i: int, paths: list[str]) -> str:
    """The number and path of a layer."""
    return f"{i + 1} · {paths[i]}"


def points(
    frame: Frame, it: list[Measured], paths: list[str], text: Callable[[float], str]
) -> list[Markup]:
    """A bar of its error through each value: a dot, or a diamond where it is harmful."""
    marks = []
    size = 4.0 if len(paths) <= 60 else 2.2
    for m in it:
        is_finite = math.isfinite(m.value)
        y = frame.down(m.value) if is_finite else TOP
        x = f"{middle(m.number, len(paths)):.3f}%"
        parts = [element("title", f"{m.name}: {m.told(text)}")]
        if is_finite and m.error:
            ends = {"y1": frame.down(m.value - m.error), "y2": frame.down(m.value + m.error)}
            parts.append(element("line", class_="error-bar", x1=x, x2=x, **ends))
        if m.is_harmful or not is_finite:
            r = size * 1.5
            shape = element("path", d=f"M0 {-r:.1f} {r:.1f} 0 0 {r:.1f} {-r:.1f} 0z", class_="bad")
            parts.append(element("svg", shape, x=x, y=y, overflow="visible"))
        else:
            parts.append(element("circle", class_="dot", cx=x, cy=y, r=size))
        marks.append(element("g", *parts))
    return marks


def box(frame: Frame, i: int, paths: list[str], quantiles: tuple[float, ...]) -> Markup:
    """Quantiles as lines of three thicknesses, and the median across the thickest."""
    n = len(paths)
    wide = thickness(n)
    told = ", ".join(number(q) for q in quantiles)
    least, low, lower, mid, upper, high, most = map(_drawable, quantiles)
    parts = [element("title", f"{label(i, paths)}: {told}")]
    for kind, ends, width in (
        ("all", (least, most), 1.0),
        ("most", (low, high), max(2.0, wide / 3)),
        ("box", (lower, upper), wide),
    ):
        if ends[0] is not None and ends[1] is not None:
            y1, y2 = frame.down(ends[0]), frame.down(ends[1])
            y2 -= 1.5 if y1 - y2 < 1.5 else 0  # what is all the same is still seen
            parts.append(_column(kind, i, n, (y1, y2), width))
    if mid is not None:
        y = frame.down(mid)
        parts.append(_column("median", i, n, (y - 1, y + 1), wide))
    return element("g", *parts)


def _column(kind: str, i: int, n: int, ends: tuple[float, float], width: float) -> Markup:
    y1, y2 = ends
    return element("line", class_=kind, y1=y1, y2=y2, stroke_width=width, **across(i, n))


def _drawable(value: float) -> float | None:
    return None if math.isnan(value) else value

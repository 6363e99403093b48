"""Drawing in SVG: elements that escape what is put into them, and a frame with two axes.

Positions across are percentages and positions down are pixels, so that a drawing is as wide as
its page gives it room while letters and lines keep their size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from batchnorm.report.scale import Scale, linear

__all__ = ["Frame", "element", "layer_frame"]

TOP = 26.0  # room for the axis's unit
HEIGHT = 180.0  # of the plot itself
_NAMED = 16  # layers whose names fit below the axis
_LETTERS = 12


def element(tag: str, *content: str, **attributes: str | float | int | None) -> Markup:
    """`<tag attributes>content</tag>`, escaped; `class_`, and `stroke_width` for `stroke-width`."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _written(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(part) for part in content)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), given, inside)  # noqa: S704 - our tags


def _written(value: str | float | int) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Frame:
    """Axes, and where values stand between them.

    `across`: ticks below, by percentage; `below`: what they count, or none.
    """

    y: Scale
    unit: str
    across: tuple[tuple[float, str], ...]
    below: str | None
    tilted: bool = False
    least_width: float = 0.0

    @property
    def bottom(self) -> float:
        """Of the plot."""
        return TOP + HEIGHT

    @property
    def height(self) -> float:
        """Of the whole drawing."""
        longest = max((len(text) for _, text in self.across), default=0)
        names = 20 + longest * 6.2 if self.tilted else 22
        return self.bottom + names + (20 if self.below else 0)

    def down(self, value: float) -> float:
        """Where a value stands, in pixels."""
        return self.bottom - HEIGHT * self.y.at(value)

    def drawing(self, key: str, title: str, description: str, marks: Iterable[Markup]) -> Markup:
        """The whole drawing, an image with a name and a description for who does not see it."""
        return element(
            "svg",
            element("title", title, id=f"{key}-name"),
            element("desc", description, id=f"{key}-words"),
            self._axes(),
            *marks,
            role="img",
            aria_labelledby=f"{key}-name",
            aria_describedby=f"{key}-words",
            width="100%",
            height=self.height,
        )

    def limit(self, value: float) -> Markup:
        """A line across at a value; what lies beyond it is tinted."""
        at = self.down(value)
        return Markup("").join(
            [
                element("rect", class_="harm", x=0, y=TOP, width="100%", height=max(at - TOP, 0)),
                element("line", class_="limit", x1=0, x2="100%", y1=at, y2=at),
            ]
        )

    def _axes(self) -> Markup:
        parts = [element("text", self.unit, class_="unit", x=-44, y=11)]
        for value, text in self.y.ticks:
            at = self.down(value)
            parts.append(element("line", class_="grid", x1=0, x2="100%", y1=at, y2=at))
            parts.append(element("text", text, x=-8, y=at, dy="0.32em", text_anchor="end"))
        parts.append(
            element("line", class_="axis", x1=0, x2="100%", y1=self.bottom, y2=self.bottom)
        )
        for percent, text in self.across:
            x = f"{percent:.3f}%"
            parts.append(
                element("line", class_="axis", x1=x, x2=x, y1=self.bottom, y2=self.bottom + 4)
            )
            if self.tilted:
                word = element("text", text, transform="rotate(-50)", text_anchor="end")
                parts.append(element("svg", word, x=x, y=self.bottom + 14, overflow="visible"))
            else:
                parts.append(element("text", text, x=x, y=self.bottom + 18, text_anchor="middle"))
        if self.below:
            end = self.height - 4
            # at the beginning, where it is seen without scrolling
            place = ("0", "start") if self.least_width else ("50%", "middle")
            parts.append(
                element("text", self.below, class_="unit", x=place[0], y=end, text_anchor=place[1])
            )
        return Markup("").join(parts)


def layer_frame(y: Scale, unit: str, paths: list[str]) -> Frame:
    """A frame with the layers along the bottom: their names, or their numbers where many."""
    n = len(paths)
    if n == 1:
        return Frame(y, unit, ((50.0, _ending(paths[0], 2 * _LETTERS)),), None)
    if n <= _NAMED:
        names = tuple((middle(i, n), name) for i, name in enumerate(_shortened(paths)))
        return Frame(y, unit, names, None, tilted=True)
    numbers = [1, *(int(value) for value, _ in linear(1.0, float(n)).ticks if value > 1)]
    across = tuple((middle(k - 1, n), str(k)) for k in numbers)
    # narrower than that they would touch: a narrow page scrolls the drawing in its box
    return Frame(y, unit, across, "layer, in the order of first calls", least_width=4.0 * n)


def middle(i: int, n: int) -> float:
    """Where the i-th of n layers stands, in percent."""
    return 100 * (i + 0.5) / n


def _shortened(paths: list[str]) -> list[str]:
    """Without the beginning that all share, and not too long to stand below an axis."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [_ending(".".join(p[shared:]), _LETTERS) for p in parts]


def _ending(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"…{name[1 - letters :]}"

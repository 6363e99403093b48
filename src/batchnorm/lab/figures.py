"""The parts of figures: readable in grey, by the colour-blind, with units, n and intervals.

Every arm has a colour, a dash and a marker of its own, the same in all figures. Colours are
Okabe and Ito's, ordered so that their lightness differs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.lab.interval import LEVEL, Interval, interval_of

__all__ = ["LOOKS", "Look", "bars", "curve", "finish", "panels", "to_svg"]

_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "font.size": 9,
    "font.family": "sans-serif",  # with all fallbacks: letters are drawn where they are read
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters stay letters: searchable, and small
    "svg.hashsalt": "batchnorm",
}
_WIDTH, _HEIGHT = 3.6, 2.9  # inches, of a panel


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, and what it is called."""

    label: str
    colour: str
    dash: str | tuple[int, tuple[int, ...]]
    marker: str


LOOKS: Mapping[str, Look] = {
    "batch": Look("batch norm", "#0072B2", "-", "o"),
    "none": Look("no norm", "#000000", (0, (4, 2)), "s"),
    "layer": Look("layer norm", "#E69F00", (0, (1, 1)), "^"),
    "group": Look("group norm", "#009E73", (0, (6, 2, 1, 2)), "D"),
    "ghost": Look("ghost batch norm", "#CC79A7", (0, (3, 1, 1, 1)), "v"),
    "renorm": Look("batch renorm", "#56B4E9", (0, (5, 1)), "P"),
    "sync": Look("synchronized", "#D55E00", (0, (2, 2)), "X"),
    "instance": Look("instance norm", "#999999", (0, (8, 2)), "*"),
}
"""By an arm's name; for others `look` counts on through the same colours."""

_OTHERS = tuple(LOOKS.values())


def look(arm: str, order: int = 0) -> Look:
    """An arm's look; one without a look of its own is told by its place among its figure's arms."""
    if arm in LOOKS:
        return LOOKS[arm]
    base = _OTHERS[order % len(_OTHERS)]
    return Look(arm, base.colour, base.dash, base.marker)


def panels(
    *titles: str, rows: int = 1, height: float = _HEIGHT, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, each with its title."""
    columns = -(-len(titles) // rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
        axes: list[Axes] = list(grid.flat)
        for axis, title in zip(axes, titles, strict=False):
            axis.set_title(title)
        for axis in axes[len(titles) :]:
            axis.set_axis_off()
    return figure, axes


def _ends(interval: Interval) -> tuple[float, float]:
    """How far the interval reaches down and up; nothing where one seed gives none."""
    if interval.n == 1:
        return 0.0, 0.0
    return interval.mean - interval.low, interval.high - interval.mean


def curve(
    axis: Axes,
    arm: str,
    across: Sequence[float | int],
    values: Sequence[Sequence[float]],
    *,
    geometric: bool = False,
    order: int = 0,
    label: str | None = None,
) -> None:
    """Means joined by a line, each with its interval over the seeds.

    Args:
        axis: To draw on.
        arm: Whose; see `LOOKS`.
        across: Where each point stands.
        values: At each point, one value a seed.
        geometric: Geometric means, for values drawn on a logarithmic axis.
        order: The arm's place among the figure's, for one without a look of its own.
        label: What the legend calls it, in place of the arm's name.
    """
    style = look(arm, order)
    intervals = [interval_of(each, geometric=geometric) for each in values]
    low, high = zip(*map(_ends, intervals), strict=True)
    axis.errorbar(
        list(across),
        [interval.mean for interval in intervals],
        yerr=[low, high],
        label=label or style.label,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=4,
        linewidth=1.4,
        capsize=2,
        elinewidth=0.9,
    )


def bars(
    axis: Axes,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    arms: Sequence[str] | None = None,
    geometric: bool = False,
) -> None:
    """Points side by side with their intervals, and every seed beside them as a small ring."""
    for i, (name, each) in enumerate(zip(labels, values, strict=True)):
        style = look(arms[i] if arms else name, i)
        interval = interval_of(each, geometric=geometric)
        low, high = _ends(interval)
        axis.errorbar(
            [i],
            [interval.mean],
            yerr=[[low], [high]],
            color=style.colour,
            marker=style.marker,
            markersize=6,
            capsize=4,
            linestyle="none",
        )
        axis.scatter(
            [i + 0.18] * len(each),
            list(each),
            s=9,
            facecolors="none",
            edgecolors="#666666",
            linewidths=0.7,
        )
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.grid(visible=False, axis="x")


def finish(figure: Figure, seeds: int, *, note: str = "") -> Figure:
    """Say below the figure how many seeds it shows, and what the bars are."""
    shown = f"n = {seeds} seeds; bars: {LEVEL:.0%} intervals of the mean"
    if seeds == 1:
        shown = "n = 1 seed: no intervals"
    below = f"{shown}; {note}" if note else shown
    figure.supxlabel(below, fontsize=7, color="#444444", x=0.01, ha="left")
    return figure


def to_svg(figure: Figure) -> str:
    """The figure's SVG, the same for the same figure."""
    with mpl.rc_context(_STYLE):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    # the letters stand where they stood: no trailing white space, for diffs' sake
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"

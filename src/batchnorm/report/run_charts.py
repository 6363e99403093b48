"""Charts of a run over time: gradients, and the modes the models were in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from batchnorm.audit import GradientNorm, LayerProfile, Period
from batchnorm.report.charts import Chart
from batchnorm.report.scale import Scale, linear, logarithmic, number
from batchnorm.report.summary import count
from batchnorm.report.svg import TOP, Frame, element
from batchnorm.report.visible import visible

__all__ = ["gradient_chart", "timeline_chart"]

_NUMBERED = 8  # lines that have their layer's number at their end
_WIDTH = 1000.0  # of the lines' own coordinates, which are stretched to the plot
_LINE = 13.0  # pixels from one number to the next
_MODELS = 12  # models whose modes are drawn
_ROW = 48.0  # pixels a model
_PERIODS = 200  # listed in the table

_MODES = {
    "train": "train",
    "train without gradients": "silent",
    "eval": "eval",
    "several": "several",
}
"""A mode's class."""


def gradient_chart(profiles: Sequence[LayerProfile]) -> Chart | None:
    """The gradients' norms over training, a line a layer; None where none was taken."""
    title = "Gradient norms over training"
    seen = [(i, p) for i, p in enumerate(profiles) if p.gradients]
    lines = [(i, p, drawn) for i, p in seen if (drawn := _drawable(p.gradients))]
    if not seen:
        return None
    rows = tuple(_row(i, p) for i, p in seen)
    columns = ("Layer", "Norms", "First", "Last", "Smallest", "Largest", "Not drawn")
    if not lines:
        words = "Every norm that was taken is 0 or not finite."
        return Chart("gradients", title, words, columns=columns, rows=rows, is_wide=True)
    points = [g for _, _, drawn in lines for g in drawn]
    first, last = min(g.step for g in points), max(g.step for g in points)
    across = linear(float(first), float(max(last, first + 1)))
    ticks = tuple((100 * across.at(value), text) for value, text in across.ticks)
    norms = [g.norm for g in points]
    frame = Frame(logarithmic(min(norms), max(norms)), "Euclidean norm", ticks, "training pass")
    deepest = max(1, len(profiles) - 1)
    inner = element(
        "svg",
        *(_line(frame, across, i, p, drawn, i / deepest) for i, p, drawn in lines),
        width="100%",
        height=frame.bottom,
        viewBox=f"0 0 {_WIDTH:g} {frame.bottom:g}",
        preserveAspectRatio="none",
    )
    words = _gradient_words(lines)
    marks = [inner, *_numbers(frame, [(i, drawn[-1]) for i, _, drawn in lines], deepest)]
    return Chart(
        "gradients",
        title,
        words,
        frame.drawing("gradients", title, words, marks),
        "The norm of the loss’s gradient by each layer’s output, on a logarithmic axis. The number "
        "at a line’s end is its layer’s. Lines that spread apart with depth say that the gradient "
        "vanishes or explodes on its way back.",
        (("shallow", "first layer"), ("halfway", "in between"), ("deep", "last layer")),
        columns,
        rows,
        is_wide=True,
    )


def _drawable(gradients: Sequence[GradientNorm]) -> list[GradientNorm]:
    return [g for g in gradients if math.isfinite(g.norm) and g.norm > 0]


def _line(
    frame: Frame,
    across: Scale,
    i: int,
    profile: LayerProfile,
    drawn: list[GradientNorm],
    depth: float,
) -> Markup:
    places = [(_WIDTH * across.at(float(g.step)), frame.down(g.norm)) for g in drawn]
    if len(places) == 1:
        places.append((places[0][0] + 1, places[0][1]))  # a dot
    return element(
        "path",
        element("title", f"{i + 1} · {visible(profile.path)}"),
        class_="gradient",
        d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places),
        style=f"--depth:{depth:.0%}",
    )


def _numbers(frame: Frame, ends: list[tuple[int, GradientNorm]], deepest: int) -> list[Markup]:
    """The layers' numbers beside the ends of some lines, pushed apart where they would touch."""
    every = max(1, math.ceil(len(ends) / _NUMBERED))
    chosen = ends[::every]
    if ends[-1] not in chosen:
        chosen[-1] = ends[-1]
    placed: list[Markup] = []
    lowest = TOP - _LINE
    wanted = sorted((frame.down(g.norm), i) for i, g in chosen)
    for left, (y, i) in enumerate(wanted):
        room = frame.bottom - _LINE * (len(wanted) - 1 - left)
        lowest = min(max(y, lowest + _LINE), room)
        leader = element(
            "path",
            class_="gradient leader",
            d=f"M2 {y:.1f}L12 {lowest:.1f}",
            style=f"--depth:{i / deepest:.0%}",
        )
        text = element("text", str(i + 1), x=15, y=lowest, dy="0.32em")
        placed.append(element("svg", leader, text, x="100%", overflow="visible"))
    return placed


def _gradient_words(lines: list[tuple[int, LayerProfile, list[GradientNorm]]]) -> str:
    ends = [(drawn[-1].norm, visible(p.path)) for _, p, drawn in lines]
    (least, smallest), (most, largest) = min(ends), max(ends)
    if len(ends) == 1:
        return f"One layer, {largest}; at the end its norm is {number(most)}."
    return (
        f"{count(len(ends), 'layer')}; at the end the norm is largest in {largest}, "
        f"{number(most)}, and smallest in {smallest}, {number(least)}: a ratio of "
        f"{number(most / least)}."
    )


def _row(i: int, profile: LayerProfile) -> tuple[str, ...]:
    norms = [g.norm for g in profile.gradients]
    finite = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
    return (
        f"{i + 1} · {visible(profile.path)}",
        str(len(norms)),
        number(norms[0]),
        number(norms[-1]),
        number(min(finite)),
        number(max(finite)),
        str(len(norms) - len(_drawable(profile.gradients))),
    )


def timeline_chart(timeline: Sequence[Period]) -> Chart | None:
    """The modes of each model, one row a model; None where none was seen."""
    title = "Modes during the run"
    models: dict[str, list[Period]] = {}
    for period in timeline:
        models.setdefault(period.model, []).append(period)
    totals = {name: sum(p.passes for p in periods) for name, periods in models.items()}
    drawn = sorted(models, key=lambda name: -totals[name])[:_MODELS]
    longest = max((totals[name] for name in drawn), default=0)
    if longest == 0:
        return None
    words = " ".join(_model_words(name, models[name]) for name in drawn)
    if len(drawn) < len(models):
        words += f" {count(len(models) - len(drawn), 'model')} with fewer passes not drawn."
    across = linear(0.0, float(longest))
    bottom = _ROW * len(drawn) + 4
    parts = [element("defs", _hatching())]
    for row, name in enumerate(drawn):
        top = row * _ROW
        parts.append(element("text", visible(name), class_="row-name", x=0, y=top + 13))
        parts += _bars(models[name], across, top + 20)
    parts.append(element("line", class_="axis", x1=0, x2="100%", y1=bottom, y2=bottom))
    for value, text in across.ticks:
        x = f"{100 * across.at(value):.3f}%"
        anchor = "start" if value == 0 else "end" if across.at(value) > 0.97 else "middle"
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        parts.append(element("text", text, x=x, y=bottom + 18, text_anchor=anchor))
    parts.append(
        element(
            "text", "forward passes", class_="unit", x="50%", y=bottom + 36, text_anchor="middle"
        )
    )
    modes = dict.fromkeys(p.mode for name in drawn for p in models[name])
    return Chart(
        "timeline",
        title,
        words,
        element(
            "svg",
            element("title", title, id="timeline-name"),
            element("desc", words, id="timeline-words"),
            *parts,
            role="img",
            aria_labelledby="timeline-name",
            aria_describedby="timeline-words",
            width="100%",
            height=bottom + 42,
        ),
        "What mode each model was in when it was called, from its first pass to its last. Training "
        "mode without gradients moves the running statistics: an eval() that was forgotten.",
        tuple((_MODES.get(mode, "several"), visible(mode)) for mode in modes),
        ("Model", "Mode", "Passes"),
        _periods(timeline),
        is_wide=True,
    )


def _bars(periods: list[Period], across: Scale, top: float) -> list[Markup]:
    bars, begun = [], 0
    for p in periods:
        x, end = 100 * across.at(float(begun)), 100 * across.at(float(begun + p.passes))
        told = f"{visible(p.mode)}: {_passes(p.passes)}, from pass {begun + 1}"
        bars.append(
            element(
                "rect",
                element("title", told),
                class_=f"mode {_MODES.get(p.mode, 'several')}",
                x=f"{x:.3f}%",
                y=top,
                width=f"{end - x:.3f}%",
                height=20,
            )
        )
        begun += p.passes
    return bars


def _hatching() -> Markup:
    """Told apart without colours too."""
    stripe = element("path", class_="stripe", d="M-1 7 7 -1 M-1 1 1 -1 M5 7 7 5", stroke_width=2)
    ground = element("rect", class_="silent-ground", width=6, height=6)
    return element(
        "pattern",
        ground,
        stripe,
        id="hatching",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )


def _model_words(name: str, periods: list[Period]) -> str:
    passes: Counter[str] = Counter()
    for period in periods:
        passes[period.mode] += period.passes
    modes = ", ".join(f"{visible(mode)} {_passes(n)}" for mode, n in passes.items())
    return f"{visible(name)}: {modes}."


def _passes(n: int) -> str:
    return count(n, "pass", "passes")


def _periods(timeline: Sequence[Period]) -> tuple[tuple[str, ...], ...]:
    listed = timeline[:_PERIODS]
    rows = [(visible(p.model), visible(p.mode), str(p.passes)) for p in listed]
    rest = timeline[_PERIODS:]
    if rest:
        rows.append(("and more", count(len(rest), "period"), str(sum(p.passes for p in rest))))
    return tuple(rows)

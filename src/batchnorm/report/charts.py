"""What people would rather look at than read: a chart of each thing measured along depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from batchnorm.audit import QUANTILES, LayerProfile
from batchnorm.audit.distance import LARGEST_SHIFT, LARGEST_STRETCH
from batchnorm.report.marks import Measured, across, box, label, points, thickness
from batchnorm.report.scale import factors, fitting, number
from batchnorm.report.summary import count
from batchnorm.report.svg import element, layer_frame
from batchnorm.report.visible import visible

__all__ = ["Chart", "depth_charts"]


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows in words, and its numbers.

    `drawing`: None where there is nothing to draw, and `words` say why.
    `key`: of the swatches' classes, and what each of them means. `least_width`: in pixels, below
    which a page scrolls the drawing in its box.
    """

    id: str
    title: str
    words: str
    drawing: Markup | None = None
    reading: str = ""
    key: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    is_wide: bool = False
    least_width: float = 0.0


def depth_charts(profiles: Sequence[LayerProfile]) -> list[Chart]:
    """A chart of each thing that was measured along the layers."""
    paths = [visible(p.path) for p in profiles]
    if not any(p.distance or p.noise or p.weight or p.dead is not None for p in profiles):
        return []
    return [
        _shift(profiles, paths),
        _stretch(profiles, paths),
        _noise(profiles, paths),
        _dead(profiles, paths),
        _weight(profiles, paths),
    ]


def _shift(profiles: Sequence[LayerProfile], paths: list[str]) -> Chart:
    it = [
        Measured(i, paths[i], d.shift, d.shift_error, _exceeds(d.shift, d.shift_error, _SHIFT))
        for i, d in enumerate(p.distance for p in profiles)
        if d is not None
    ]
    return _limited(
        "shift",
        "Running mean against the batches’",
        it,
        paths,
        _SHIFT,
        (number, "standard deviations (σ)", f"harmful above {number(_SHIFT)} σ"),
        "How far each layer’s running mean is from the mean of its batches, as root mean square "
        "over channels.",
    )


def _stretch(profiles: Sequence[LayerProfile], paths: list[str]) -> Chart:
    it = [
        Measured(
            i, paths[i], d.stretch, d.stretch_error, _exceeds(d.stretch, d.stretch_error, _STRETCH)
        )
        for i, d in enumerate(p.distance for p in profiles)
        if d is not None
    ]
    return _limited(
        "stretch",
        "Running deviation against the batches’",
        it,
        paths,
        _STRETCH,
        (_factor, "factor, either way", f"harmful above {_factor(_STRETCH)}"),
        "By which factor each layer’s running standard deviation differs from that of its "
        "batches, as root mean square over channels, on a logarithmic axis.",
    )


_SHIFT, _STRETCH = LARGEST_SHIFT, math.log(LARGEST_STRETCH)


def _exceeds(value: float, error: float, limit: float) -> bool:
    return not value - 2 * error <= limit  # what is no number exceeds


def _factor(logarithm: float) -> str:
    return f"×{number(math.exp(logarithm))}" if logarithm < 700 else "infinite"


def _limited(
    key: str,
    title: str,
    it: list[Measured],
    paths: list[str],
    limit: float,
    texts: tuple[Callable[[float], str], str, str],
    reading: str,
) -> Chart:
    """A chart of values with errors, below a limit."""
    text, unit, limit_text = texts
    if not it:
        return Chart(key, title, _NO_BATCHES)
    harmful = [m for m in it if m.is_harmful]
    told = (
        f"Of {count(len(it), 'layer')}, {len(harmful)} beyond it by more than twice the error: "
        f"{_listed(m.path for m in harmful)}."
        if harmful
        else f"Of {count(len(it), 'layer')}, none is certainly beyond it."
    )
    words = f"{limit_text.capitalize()}. {told} {_largest(it, text)}"
    high = max([limit * 1.35, *(m.value + m.error for m in it if math.isfinite(m.value))])
    high *= 1.04
    y = factors(high, limit) if text is _factor else fitting(0.0, high, limit)
    frame = layer_frame(y, unit, paths)
    marks = [frame.limit(limit), *points(frame, it, paths, text)]
    drawn = [("limit", limit_text), ("dot", "± 1 standard error")]
    if harmful:
        drawn.append(("bad", "beyond it by more than two standard errors"))
    return Chart(
        key,
        title,
        words,
        frame.drawing(key, title, words, marks),
        reading,
        tuple(drawn),
        ("Layer", "Value", "Standard error", "Harmful"),
        tuple(
            (m.name, text(m.value), number(m.error), "yes" if m.is_harmful else "no") for m in it
        ),
        least_width=frame.least_width,
    )


def _noise(profiles: Sequence[LayerProfile], paths: list[str]) -> Chart:
    title = "Noise of the batch statistics"
    it = [
        Measured(i, paths[i], p.noise.value, p.noise.error)
        for i, p in enumerate(profiles)
        if p.noise is not None
    ]
    if not it:
        return Chart("noise", title, _NO_BATCHES)
    finite = [m for m in it if math.isfinite(m.value)]
    usual = median([m.value for m in finite] or [1.0])
    high = max([1e-6, *(m.value + m.error for m in finite)])
    frame = layer_frame(fitting(0.0, high * 1.1, usual), "standard deviations of an output", paths)
    words = _largest(it, number)
    return Chart(
        "noise",
        title,
        words,
        frame.drawing("noise", title, words, points(frame, it, paths, number)),
        "By how much a batch’s own mean and variance move an output, compared with those of all "
        "batches: 0.1 is a tenth of a standard deviation. It falls with larger batches.",
        (("dot", "± 1 standard error"),),
        ("Layer", "Noise", "Standard error"),
        tuple((m.name, number(m.value), number(m.error)) for m in it),
        least_width=frame.least_width,
    )


def _weight(profiles: Sequence[LayerProfile], paths: list[str]) -> Chart:
    title = "Distribution of γ"
    it = [(i, p.weight) for i, p in enumerate(profiles) if p.weight is not None]
    values = [v for _, quantiles in it for v in quantiles if math.isfinite(v)]
    if not values:
        return Chart("weight", title, "No layer has a γ of which something could be drawn.")
    usual = median([abs(v) for _, q in it for v in q[2:5] if math.isfinite(v)] or [1.0])
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 1.0
    frame = layer_frame(fitting(low - (margin if low < 0 else 0), high + margin, usual), "γ", paths)
    medians = [q[3] for _, q in it if math.isfinite(q[3])] or [math.nan]
    words = (
        f"γ lies between {number(min(values))} and {number(max(values))}; the layers’ medians "
        f"between {number(min(medians))} and {number(max(medians))}."
    )
    boxes = [box(frame, i, paths, quantiles) for i, quantiles in it]
    zero = element("line", class_="zero", x1=0, x2="100%", y1=frame.down(0.0), y2=frame.down(0.0))
    return Chart(
        "weight",
        title,
        words,
        frame.drawing("weight", title, words, [zero, *boxes]),
        "Over the channels of each layer. A channel whose γ is 0 carries nothing of its input.",
        (
            ("box", "half of the channels, and the median"),
            ("most", "5 % to 95 %"),
            ("all", "all of them"),
        ),
        ("Layer", *(f"{q:.0%}".replace("%", " %") for q in QUANTILES)),
        tuple((label(i, paths), *map(number, q)) for i, q in it),
        is_wide=True,
        least_width=frame.least_width,
    )


def _dead(profiles: Sequence[LayerProfile], paths: list[str]) -> Chart:
    title = "Dead channels"
    it = [(i, p.dead, p.channels) for i, p in enumerate(profiles) if p.dead is not None]
    if not it:
        return Chart("dead", title, _NO_BATCHES)
    dead, channels = sum(d for _, d, _ in it), sum(c for _, _, c in it)
    if dead == 0:
        among = f"{count(channels, 'channel')} in {count(len(it), 'layer')}"
        return Chart("dead", title, f"None of {among} is dead: every output moves with its input.")
    shares = [(i, d / max(c, 1), f"{d} of {c}") for i, d, c in it]
    high = max(share for _, share, _ in shares)
    most = max(shares, key=lambda s: s[1])
    words = f"{dead} of {channels} channels; most in {paths[most[0]]}, {most[2]}."
    frame = layer_frame(
        fitting(0.0, min(1.0, high * 1.15), 1.0, _percent), "share of the channels", paths
    )
    bars = [
        element(
            "line",
            element("title", f"{label(i, paths)}: {told}"),
            class_="column",
            y1=frame.bottom,
            y2=frame.down(share),
            stroke_width=thickness(len(paths)),
            **across(i, len(paths)),
        )
        for i, share, told in shares
        if share
    ]
    return Chart(
        "dead",
        title,
        words,
        frame.drawing("dead", title, words, bars),
        "Channels whose output hardly moves, whatever comes in.",
        (),
        ("Layer", "Dead", "Share"),
        tuple((label(i, paths), told, _percent(share)) for i, share, told in shares),
        least_width=frame.least_width,
    )


_NO_BATCHES = (
    "Not measured in these layers: it takes at least four batches of training, and running "
    "statistics that training moves."
)


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"


def _largest(it: list[Measured], text: Callable[[float], str]) -> str:
    worst = max(it, key=lambda m: m.value if math.isfinite(m.value) else math.inf)
    return f"The largest is {worst.told(text)}, in {worst.path}."


def _listed(paths: Iterable[str], shown: int = 4) -> str:
    names = list(paths)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")

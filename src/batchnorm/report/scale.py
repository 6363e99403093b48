"""Scales: where a value stands along an axis, and which values the axis names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Scale", "factors", "fitting", "linear", "logarithmic", "number", "power"]

Format = Callable[[float], str]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RATIOS = (1, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, *(10.0**e for e in range(1, 300)))
_CROWDED = 10  # times as far out as most: then the axis is stretched around 0


def number(value: float) -> str:
    """Three digits, as people write them."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.replace('-', '−')}·{power(int(exponent))}"
    return f"{value:.6g}".replace("-", "−") if value == int(value) else _short(value)


def power(exponent: int) -> str:
    """A power of ten, such as 10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """From values to 0 at the axis's low end and 1 at its high end."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    transform: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """Where a value stands; at the ends for what lies beyond them."""
        low, high = self.transform(self.low), self.transform(self.high)
        where = (self.transform(min(max(value, self.low), self.high)) - low) / (high - low)
        return min(max(where, 0.0), 1.0)


def linear(low: float, high: float, text: Format = number, ticks: int = 4) -> Scale:
    """Even steps."""
    if not high > low:
        low, high = low - 1, low + 1
    step = _step((high - low) / ticks)
    # counted, not added up: 0.1 + 0.2 is not 0.3
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Scale(low, high, tuple((n * step, text(n * step)) for n in numbers))


def logarithmic(low: float, high: float, ticks: int = 6) -> Scale:
    """Powers of ten; `low` is positive."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first) / ticks)
    named = range(first, last + 1, every)
    return Scale(10.0**first, 10.0**last, tuple((10.0**e, power(e)) for e in named), math.log10)


def fitting(low: float, high: float, usual: float, text: Format = number) -> Scale:
    """Even steps, or around 0 ever wider ones where most values would be crowded there.

    `usual`: how large values usually are.
    """
    largest = max(abs(low), abs(high))
    if not usual > 0 or largest <= _CROWDED * usual:
        return linear(low, high, text)

    def stretched(value: float) -> float:
        return math.asinh(value / usual)

    unit = 10.0 ** math.floor(math.log10(usual))
    decades = math.ceil(math.log10(largest / unit))
    every = math.ceil(decades / 4)
    sizes = [unit * 10.0**e for e in range(0, decades + 1, every)]
    values = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    ticks = tuple((value, text(value)) for value in values if low <= value <= high)
    return Scale(low, high, ticks, stretched)


def factors(high: float, usual: float) -> Scale:
    """Logarithms of ratios from 1 on, named as ratios: ×1, ×1.5, ×2 and on."""
    plain = fitting(0, high, usual)
    named: list[tuple[float, str]] = []
    last = -1.0
    for ratio in _RATIOS:
        value = math.log(ratio)
        if value <= high and plain.at(value) - last >= 0.18:
            named.append((value, f"×{number(ratio)}"))
            last = plain.at(value)
    return replace(plain, ticks=tuple(named))


def _step(least: float) -> float:
    unit = 10.0 ** math.floor(math.log10(least))
    return next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= least * (1 - 1e-9))

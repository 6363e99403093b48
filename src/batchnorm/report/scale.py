"""Scales: where a value stands along an axis, and which values the axis names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Scale", "factors", "fitting", "linear", "logarithmic", "number", "power"]

Format = Callable[[float], str]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RATIOS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, *(10.0**e for e in range(1, 300)))
_HUGE = 1e300  # and its inverse: beyond them there is nothing to compute with
_WIDEST = 1e12  # from the largest to what is still told from 0
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
    digits = ".0f" if value == int(value) or abs(value) >= 1000 else ".3g"
    return f"{value:{digits}}".replace("-", "−")


def power(exponent: int) -> str:
    """A power of ten, such as 10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


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
    low, high = (min(max(end, -_HUGE), _HUGE) for end in (low, high))
    least = max(abs(low), abs(high)) / 1e6  # of a range that can be told apart
    if not high - low > max(least, 1 / _HUGE):
        low, high = low - max(least, 1.0), high + max(least, 1.0)
    step = _step((high - low) / ticks)
    # counted, not added up: 0.1 + 0.2 is not 0.3
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Scale(low, high, tuple((n * step, text(n * step)) for n in numbers))


def logarithmic(low: float, high: float, ticks: int = 6) -> Scale:
    """Powers of ten, and 2 and 5 times those where they are few; `low` is positive."""
    low = min(max(low / 1.3, 1 / _HUGE), _HUGE / 10)
    high = min(max(high * 1.3, low * 3), _HUGE)  # from 2 to 5 is the widest gap between ticks
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [e for e in exponents if low <= 10.0**e <= high]
    named = [(10.0**e, power(e)) for e in within[:: math.ceil(len(within) / ticks) or 1]]
    if len(within) < 3:
        values = [digit * 10.0**e for e in exponents for digit in (1, 2, 5)]
        named = [(value, number(value)) for value in values if low <= value <= high]
    return Scale(low, high, tuple(named), math.log10)


def fitting(low: float, high: float, usual: float, text: Format = number) -> Scale:
    """Even steps, or around 0 ever wider ones where most values would be crowded there.

    `usual`: how large values usually are.
    """
    low, high = max(low, -_HUGE), min(high, _HUGE)
    largest = max(abs(low), abs(high))
    if not usual > 0 or largest <= _CROWDED * usual:
        return linear(low, high, text)
    around = max(usual, largest / _WIDEST)

    def stretched(value: float) -> float:
        return math.asinh(value / around)

    scale = Scale(low, high, (), stretched)
    first, last = (math.floor(math.log10(size)) for size in (around, largest))
    sizes = [10.0**e for e in range(first, last + 1)]
    # from 0 outwards
    values = sorted([0.0, *sizes, *(-size for size in sizes)], key=abs)
    return _with_ticks(scale, [(value, text(value)) for value in values], 0.12)


def factors(high: float, usual: float) -> Scale:
    """Logarithms of ratios from 1 on, named as ratios: ×1, ×1.5, ×2 and on."""
    named = [(math.log(ratio), f"×{number(ratio)}") for ratio in _RATIOS]
    return _with_ticks(fitting(0.0, high, usual), named, 0.18)


def _with_ticks(scale: Scale, named: list[tuple[float, str]], apart: float) -> Scale:
    """With those of the ticks that are on it and not too near to one before."""
    ticks: list[tuple[float, str]] = []
    for value, text in named:
        is_near = any(abs(scale.at(value) - scale.at(other)) < apart for other, _ in ticks)
        if scale.low <= value <= scale.high and not is_near:
            ticks.append((value, text))
    return replace(scale, ticks=tuple(ticks))


def _step(least: float) -> float:
    unit = 10.0 ** math.floor(math.log10(least))
    return next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= least * (1 - 1e-9))

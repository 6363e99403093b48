from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchnorm.report.scale import factors, fitting, linear, logarithmic, number

ANY = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


def check(scale, values) -> None:
    """In order, within the axis, and with ticks that do not touch."""
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    assert scale.at(scale.low) == 0
    assert scale.at(scale.high) == 1
    ticks = sorted(scale.at(value) for value, _ in scale.ticks)
    assert 1 <= len(ticks) <= 13
    assert all(b - a > 0.05 for a, b in pairwise(ticks))


@given(ANY, ANY)
def test_even_steps_fit_any_numbers(a, b):
    check(linear(min(a, b), max(a, b)), [a, b])


@given(POSITIVE, POSITIVE)
@example(2.6000000000000004e16, 2.6000000000000004e16)  # just above a tick, far below the next
def test_powers_fit_any_positive_numbers(a, b):
    scale = logarithmic(min(a, b), max(a, b))
    check(scale, [a, b, math.sqrt(a) * math.sqrt(b)])


@given(ANY, ANY, POSITIVE)
def test_an_axis_fits_any_numbers(a, b, usual):
    check(fitting(min(a, b, 0.0), max(a, b, 0.0), usual), [a, 0.0, b])


@given(st.floats(min_value=0.42, max_value=1e5))
def test_ratios_fit_any_logarithms(high):
    check(factors(high, math.log(1.5)), [0.0, 0.1, high])


def test_ticks_are_round():
    assert [text for _, text in linear(0.0, 0.93).ticks] == ["0", "0.25", "0.5", "0.75"]
    assert [text for _, text in linear(-3.0, 41.0).ticks] == ["0", "20", "40"]
    assert [text for _, text in logarithmic(2e-4, 3.0).ticks] == [
        "10⁻³",
        "10⁻²",
        "10⁻¹",
        "10⁰",
    ]
    assert [text for _, text in logarithmic(0.9, 3.0).ticks] == ["1", "2"]
    assert [text for _, text in factors(0.6, math.log(1.5)).ticks] == ["×1", "×1.2", "×1.5"]


def test_an_axis_is_stretched_around_0_where_most_would_be_crowded():
    assert fitting(0.0, 5.0, 1.0).at(2.5) == 0.5
    scale = fitting(0.0, 1000.0, 1.0)
    assert scale.at(1.0) == pytest.approx(math.asinh(1) / math.asinh(1000))
    assert [text for _, text in scale.ticks] == ["0", "10", "100", "1000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (7.0, "7"),
        (2352.0, "2352"),
        (-0.25, "−0.25"),
        (0.12345, "0.123"),
        (1234.5, "1234"),
        (1e-5, "1.00·10⁻⁵"),
        (-2.5e12, "−2.50·10¹²"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (-math.inf, "−infinite"),
    ],
)
def test_numbers_are_written_as_people_do(value, text):
    assert number(value) == text

"""Intervals, against scipy's own and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchnorm.lab.interval import LEVEL, interval_of

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


@given(VALUES)
def test_it_is_student_s(values):
    it = interval_of(values)
    assert it.n == len(values)
    assert it.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    scale = stats.sem(values)
    if scale > 1e-9:
        low, high = stats.t.interval(LEVEL, len(values) - 1, np.mean(values), scale)
        assert (it.low, it.high) == pytest.approx((low, high), rel=1e-9, abs=1e-6)


def test_five_seeds_by_hand():
    # mean 3, s = √2.5, s/√5 = √0.5, and Student's 97.5 % quantile at 4 degrees of freedom
    it = interval_of([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * math.sqrt(0.5)
    assert (it.mean, it.low, it.high) == pytest.approx((3, 3 - half, 3 + half))


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
def test_ratios_have_the_interval_of_their_logarithms_and_turn_over(values):
    it, inverse = (interval_of(v, geometric=True) for v in (values, [1 / v for v in values]))
    logs = interval_of([math.log(v) for v in values])
    assert it.mean == pytest.approx(math.exp(logs.mean))
    assert inverse.mean == pytest.approx(1 / it.mean)
    if it.low > 1e-200 and it.high < 1e200:
        assert (inverse.low, inverse.high) == pytest.approx((1 / it.high, 1 / it.low), rel=1e-6)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    drawn = np.random.default_rng(0).normal(2.0, 3.0, (4000, 5))
    held = [it.low < 2.0 < it.high for it in map(interval_of, drawn.tolist())]
    assert np.mean(held) == pytest.approx(LEVEL, abs=0.01)  # 3 standard errors


def test_one_seed_has_no_interval():
    for geometric in (False, True):
        it = interval_of([2.0], geometric=geometric)
        assert (it.mean, it.n, it.high) == (2.0, 1, math.inf)
        assert it.low == (0.0 if geometric else -math.inf)


@pytest.mark.as_installed
@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        interval_of(values)


def test_ratios_are_positive():
    with pytest.raises(ValueError, match="positive"):
        interval_of([1.0, 0.0], geometric=True)

"""From intervals to answers, and from answers to verdicts."""

import pytest

from batchnorm.lab.hypothesis import Answer, Hypothesis, Verdict, verdict_of
from batchnorm.lab.results import Results


def judged(values, **bar):
    results = Results({"seed": seed, "effect": value} for seed, value in enumerate(values))
    return Hypothesis("here", "it", lambda r: r.values("effect"), **bar).judge(results)


CLOSE = (1.9, 2.0, 2.1, 2.0, 2.0)  # 1.91 to 2.09


@pytest.mark.parametrize(
    ("bar", "answer"),
    [
        ({"more_than": 1.9}, Answer.HOLDS),
        ({"more_than": 2.0}, Answer.OPEN),
        ({"more_than": 2.1}, Answer.FAILS),
        ({"less_than": 2.1}, Answer.HOLDS),
        ({"less_than": 2.0}, Answer.OPEN),
        ({"less_than": 1.9}, Answer.FAILS),
    ],
)
def test_the_whole_interval_is_beyond_the_bar_or_not(bar, answer):
    for unit in ("", "×"):
        assert judged(CLOSE, unit=unit, **bar).answer is answer


def test_values_that_are_all_on_the_bar_are_not_beyond_it():
    assert judged([0.0] * 5, more_than=0.0).answer is Answer.FAILS
    assert judged([0.0] * 5, less_than=0.0).answer is Answer.FAILS
    assert judged([0.0] * 5, less_than=1e-6).answer is Answer.HOLDS


def test_ratios_have_a_geometric_mean():
    assert judged([1.0, 4.0], more_than=1.0, unit="×").interval.mean == pytest.approx(2.0)


def test_all_hold_or_none_or_it_depends():
    holds, fails, opens = (judged(CLOSE, more_than=bar) for bar in (1.0, 3.0, 2.0))
    assert verdict_of([holds, holds]) is Verdict.SUPPORTED
    assert verdict_of([holds, fails]) is Verdict.DEPENDS
    assert verdict_of([holds, opens]) is Verdict.DEPENDS
    assert verdict_of([opens, fails]) is Verdict.NOT_SUPPORTED
    assert verdict_of([opens]) is Verdict.NOT_SUPPORTED


def test_four_seeds_are_too_few_for_a_verdict():
    few = judged([2.0, 2.1, 1.9, 2.0], more_than=1.0)
    assert few.answer is Answer.HOLDS
    assert verdict_of([few, judged(CLOSE, more_than=1.0)]) is None


@pytest.mark.parametrize("bars", [{}, {"more_than": 1.0, "less_than": 2.0}])
def test_a_hypothesis_has_one_bar(bars):
    with pytest.raises(ValueError, match="one bar"):
        Hypothesis("here", "it", lambda r: [], **bars)

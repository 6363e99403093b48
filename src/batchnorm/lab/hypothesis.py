"""What is said before an experiment is run, and what it says of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from batchnorm.lab.interval import Interval, interval_of
from batchnorm.lab.results import Results

__all__ = ["ENOUGH_SEEDS", "Answer", "Hypothesis", "Judgement", "Verdict", "verdict_of"]

ENOUGH_SEEDS = 5


class Answer(str, Enum):
    """What the interval says of a hypothesis."""

    HOLDS = "holds"
    FAILS = "fails"
    OPEN = "open"


class Verdict(str, Enum):
    """What all hypotheses together say of a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    DEPENDS = "depends"


@dataclass(frozen=True)
class Hypothesis:
    """One measure, in one setting: its direction and by how much, stated before the run.

    Args:
        where: The setting, in a few words: "plain network, 20 layers". What a claim depends on is
            told by it.
        measure: What the number is, in words.
        effect: The number from the results, one a seed.
        more_than: The bar that the effect is above; or
        less_than: the bar that it is below. One of them is given.
        unit: Of the effect: "×" for ratios (whose mean is then the geometric one), "points" for
            percentage points, and so on.
    """

    where: str
    measure: str
    effect: Callable[[Results], Sequence[float]]
    more_than: float | None = None
    less_than: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.more_than is None) == (self.less_than is None):
            raise ValueError(
                f"a hypothesis has one bar, more_than or less_than; {self.where!r} has "
                f"{self.more_than} and {self.less_than}"
            )

    def judge(self, results: Results) -> Judgement:
        """Compare the effect's interval with the bar.

        It holds where the whole interval is beyond the bar, fails where the whole interval is
        not, and is open where the bar is inside.
        """
        values = [float(value) for value in self.effect(results)]
        interval = interval_of(values, geometric=self.unit == "×")
        if self.more_than is not None:
            holds, fails = interval.low > self.more_than, interval.high <= self.more_than
        else:
            assert self.less_than is not None
            holds, fails = interval.high < self.less_than, interval.low >= self.less_than
        answer = Answer.HOLDS if holds else Answer.FAILS if fails else Answer.OPEN
        return Judgement(self, interval, tuple(values), answer)


@dataclass(frozen=True)
class Judgement:
    """A hypothesis, what was measured of it, and its answer."""

    hypothesis: Hypothesis
    interval: Interval
    values: tuple[float, ...]
    answer: Answer


def verdict_of(judgements: Iterable[Judgement]) -> Verdict | None:
    """Supported where every hypothesis holds, not supported where none does, else it depends.

    None where a hypothesis was measured with fewer than `ENOUGH_SEEDS` seeds. As *all* have to
    hold, each at its own level, no correction for their number is needed for "supported".
    """
    judged = list(judgements)
    if min(judgement.interval.n for judgement in judged) < ENOUGH_SEEDS:
        return None
    holding = sum(judgement.answer is Answer.HOLDS for judgement in judged)
    if holding == len(judged):
        return Verdict.SUPPORTED
    return Verdict.DEPENDS if holding else Verdict.NOT_SUPPORTED

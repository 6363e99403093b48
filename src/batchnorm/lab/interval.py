"""The mean of what seeds gave, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["LEVEL", "Interval", "interval_of"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval at `LEVEL`, from `n` seeds.

    With a single seed there is no interval: `low` and `high` are minus and plus infinity.
    """

    mean: float
    low: float
    high: float
    n: int


def interval_of(values: Sequence[float], *, geometric: bool = False) -> Interval:
    """Student's interval for the mean: mean ± t(n − 1) · s / √n.

    Args:
        values: One a seed, all finite.
        geometric: For ratios: the geometric mean, its interval computed on logarithms.

    Raises:
        ValueError: No value, one that is not finite, or, for ratios, one that is not positive.

    Source: Student 1908, section IX; for ratios, the same of their logarithms.
    """
    given = np.asarray(values, dtype=np.float64)
    if not given.size or not np.isfinite(given).all():
        raise ValueError(f"an interval is of finite values, one or more; got {list(values)}")
    if geometric:
        if not (given > 0).all():
            raise ValueError(f"a geometric mean is of positive values, got {list(values)}")
        inner = interval_of(np.log(given).tolist())
        # an interval may be so wide that its end is beyond any number
        low, high = (math.exp(min(end, 700.0)) for end in (inner.low, inner.high))
        return Interval(math.exp(inner.mean), low, high if inner.high < 700 else math.inf, inner.n)
    mean = float(given.mean())
    if given.size == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, given.size - 1) * stats.sem(given))
    return Interval(mean, mean - half, mean + half, given.size)

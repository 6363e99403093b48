"""How every benchmark here measures: candidates in turns in one process, medians and ratios."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": "0"}
"""The environment in which glibc's allocator keeps its memory."""


class Clock(Protocol):
    """Something that marks moments and says later how far apart they were."""

    def mark(self) -> Any:
        """Mark this moment."""

    def between(self, marks: list[Any]) -> tuple[float, ...]:
        """Seconds from each mark to the next."""


class HostClock:
    """The processor's clock, for work that is done when it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, marks: list[float]) -> tuple[float, ...]:
        return tuple(b - a for a, b in itertools.pairwise(marks))


HOST = HostClock()


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round: one after the other, so noise hits all alike."""

    def whole(work: Callable[[], object]) -> Callable[[], Iterator[None]]:
        def lap() -> Iterator[None]:
            work()
            yield

        return lap

    laps = laps_in_turns({name: whole(work) for name, work in candidates.items()}, rounds)
    return {name: [seconds for (seconds,) in times] for name, times in laps.items()}


def laps_in_turns(
    candidates: dict[str, Callable[[], Iterator[None]]],
    rounds: int,
    clock: Clock = HOST,
    warm_up: int = 3,
) -> dict[str, list[tuple[float, ...]]]:
    """As `in_turns`, for candidates of several parts: seconds up to each of their `yield`s.

    Every second round goes backwards, so that none always follows the same other.
    """
    for work in candidates.values():  # caches, allocators and lazy set-up
        for _ in range(warm_up):
            _laps(work, clock)
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for _ in range(rounds):
        order.reverse()
        for name, work in order:
            seconds[name].append(_laps(work, clock))
    return seconds


def _laps(work: Callable[[], Iterator[None]], clock: Clock) -> tuple[float, ...]:
    marks = [clock.mark()]
    for _ in work():
        marks.append(clock.mark())  # noqa: PERF401 - a comprehension's set-up would count
    return clock.between(marks)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else values
    return statistics.median(values), fifths[0], fifths[-1]


def ratio_spread(times: list[float], of: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the rounds' ratios of `times` over `of`."""
    return spread([a / b for a, b in zip(times, of, strict=True)])


def ratio(times: list[float], of: list[float]) -> str:
    """`times` over `of`: the median of the rounds' ratios, with the 20th and 80th percentile."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio_spread(times, of))


def machine() -> str:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            s.split(":")[1].strip() for s in info.read_text().splitlines() if "model name" in s
        ]
        cpu = models[0] if models else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"

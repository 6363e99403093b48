"""How every benchmark here measures: candidates in turns in one process, medians and ratios."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": "0"}
"""The environment in which glibc's allocator keeps its memory."""


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
    candidates: dict[str, Callable[[], Iterator[None]]], rounds: int
) -> dict[str, list[tuple[float, ...]]]:
    """As `in_turns`, for candidates of several parts: seconds up to each of their `yield`s.

    Every second round goes backwards, so that none always follows the same other.
    """
    for work in candidates.values():  # caches, allocators and lazy set-up
        for _ in range(3):
            _laps(work)
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for _ in range(rounds):
        order.reverse()
        for name, work in order:
            seconds[name].append(_laps(work))
    return seconds


def _laps(work: Callable[[], Iterator[None]]) -> tuple[float, ...]:
    times = [time.perf_counter()]
    for _ in work():
        times.append(time.perf_counter())  # noqa: PERF401 - a comprehension's set-up would count
    return tuple(b - a for a, b in itertools.pairwise(times))


def ratio(times: list[float], of: list[float]) -> str:
    """`times` over `of`: the median of the rounds' ratios, with the 20th and 80th percentile."""
    ratios = [a / b for a, b in zip(times, of, strict=True)]
    fifths = statistics.quantiles(ratios, n=5)
    return f"{statistics.median(ratios):.2f} ({fifths[0]:.2f} to {fifths[-1]:.2f})"


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

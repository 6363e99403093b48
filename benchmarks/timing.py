"""How every benchmark here measures: candidates in turns in one process, medians and ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round: one after the other, so that noise hits all alike.

    Every second round goes backwards, so that none always follows the same other.
    """
    for work in candidates.values():  # caches, allocators and lazy set-up
        for _ in range(3):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for _ in range(rounds):
        order.reverse()
        for name, work in order:
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the rounds' ratios, with the 20th and 80th percentile."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
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

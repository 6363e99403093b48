"""Run a claim's quick profile within a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from weakref import WeakKeyDictionary

import jaxtyping
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from batchnorm.lab.claim import AnyClaim
from batchnorm.lab.profile import QUICK
from batchnorm.lab.results import Results

FIRST = 20  # passes


def quick(claim: type[AnyClaim]) -> Results:
    """What the trials of the quick profile measure, one seed of each."""
    made = claim()
    rows = []
    for trial in made.trials(QUICK):
        torch.manual_seed(trial.seed)
        with _checked_at_first():
            outcome = made.run(trial, torch.device("cpu"))
        rows.append({**asdict(trial), **outcome})
    return Results(rows)


@contextmanager
def _checked_at_first() -> Iterator[None]:
    """Shapes are checked in a module's first passes in each mode, and always outside of passes.

    Thousands of passes more have the same shapes; checking them is most of a quick run's time.
    """
    passes: WeakKeyDictionary[nn.Module, Counter[bool]] = WeakKeyDictionary()
    unchecked: list[nn.Module] = []

    def before(module: nn.Module, _: object) -> None:
        made = passes.setdefault(module, Counter())
        made[module.training] += 1
        if made[module.training] > FIRST and not unchecked:
            unchecked.append(module)
            jaxtyping.config.update("jaxtyping_disable", True)

    def after(module: nn.Module, *_: object) -> None:
        if unchecked == [module]:
            unchecked.clear()
            jaxtyping.config.update("jaxtyping_disable", False)

    handles = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

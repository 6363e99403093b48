"""Claims that cost nothing, to test the laboratory by; processes import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure

from batchnorm.lab.claim import Claim
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results


@dataclass(frozen=True)
class Trial:
    arm: str
    seed: int


def gain(results: Results, arm: str) -> list[float]:
    pairs = zip(
        results.where(arm=arm).values("level"),
        results.where(arm="none").values("level"),
        strict=True,
    )
    return [a - b for a, b in pairs]


class Invented(Claim[Trial]):
    """An arm adds what it is said to add.

    Each trial draws a number, and its arm adds one | two to it.
    """

    number = 1
    name = "invented"
    source = "nobody 1900, section 0"
    hypotheses = (
        Hypothesis("one", "added | measured", partial(gain, arm="one"), more_than=0.5),
        Hypothesis("two", "added", partial(gain, arm="two"), less_than=1.5, unit="points"),
    )
    adds = {"none": 0.0, "one": 1.0, "two": 2.0}  # noqa: RUF012 - as a claim's constants

    def trials(self, profile: Profile) -> Iterator[Trial]:
        for arm in profile.choose(full=("none", "one", "two"), quick=("none", "one")):
            for seed in range(profile.seeds):
                yield Trial(arm, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        drawn = float(torch.rand(()))
        return {
            "level": drawn + self.adds[trial.arm],
            "drawn": drawn,
            "threads": torch.get_num_threads(),
            "process": os.getpid(),
        }

    def figure(self, results: Results) -> Figure:
        figure, (axis,) = panels("levels")
        arms = results.distinct("arm")
        bars(axis, arms, [results.where(arm=arm).values("level") for arm in arms])
        return finish(figure, len(results.seeds))


class Failing(Invented):
    """Every second seed raises."""

    number = 2
    name = "failing"

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        if trial.seed % 2:
            raise ArithmeticError("an odd seed")
        return super().run(trial, device)


class Slow(Invented):
    """Trials of a second, after a first one that takes no time."""

    number = 3
    name = "slow"

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        if trial.seed:
            time.sleep(1)
        return super().run(trial, device)


class Deadly(Invented):
    """The process of its last trial is killed."""

    number = 4
    name = "deadly"

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        if trial.seed == 4:
            time.sleep(1)  # the others are back by then
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(trial, device)

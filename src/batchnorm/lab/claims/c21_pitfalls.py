"""Claim 21: the classic mistakes, made for real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import digits
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.mistakes import KINDS, MISTAKES
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results

__all__ = ["Pitfalls"]


@dataclass(frozen=True)
class Trial:
    """One mistake, made and not made. `steps`: of training, with batches of 32."""

    mistake: str
    steps: int
    seed: int


def harm(results: Results, mistake: str) -> list[float]:
    """The points of test accuracy that a mistake costs each seed."""
    own = results.where(mistake=mistake)
    pairs = zip(own.values("right"), own.values("wrong"), strict=True)
    return [right - wrong for right, wrong in pairs]


def share(results: Results, measure: str) -> list[float]:
    """How many percent of a seed's trials have a measure that is true."""
    seeds = (results.where(seed=seed) for seed in results.seeds)
    return [100 * sum(bool(row[measure]) for row in own) / len(own) for own in seeds]


class Pitfalls(Claim[Trial]):
    """The classic mistakes with batch norm cost accuracy, and the auditor finds each of them.

    Eleven mistakes, each made and not made, with everything else the same: a plain network of 5
    layers with PyTorch's own batch norm learns scikit-learn's digits (1,000 images, 200 steps of
    32, SGD with momentum 0.9, rate 0.1), and the harm is the difference in test accuracy.

    *Inference with statistics not its own.* Images are answered one by one in training mode
    (BN108); parameters are saved without buffers (BN106); a momentum of 0.001 is not through
    (BN103); the weights of all steps are averaged and the statistics are the last step's (BN105,
    against recalibration); the head goes on to learn inverted images on features whose parameters
    alone are frozen, and, put back as it was, no longer gets what it knew (BN102, against
    `freeze`).

    *Training on batches unlike the data.* A perceptron sees as many samples in batches of 2, at a
    rate as much smaller (BN110); images lie sorted by class and only batches are shuffled (BN124;
    that harms gradients as well); micro-batches of 4 are accumulated eight at a time (BN122,
    against batches of 32); sequences of at most 8 columns of ink are padded to 24 and the norm
    does not know (BN125, against `mask=`), while convolutions and average do.

    *Statistics kept badly.* A model learns in bfloat16 with its buffers (BN121), and an activation
    checkpoint counts each batch twice (BN107), both against this library's layers.

    The auditor, with the rule in brackets, watches or looks at both: it should find the mistake
    where it was made, and nothing where it was not.

    Changed after a pilot run: one hypothesis for each mistake, with a bar of 1 point, in place of
    three on the means of the kinds, with bars of 5, 2 and 1; how batches of 2 are trained on, and
    how weights are averaged.
    """

    number = 21
    name = "pitfalls"
    source = "the evidence that the pages of the rules in brackets cite: `batchnorm rules BN108`"
    hypotheses = (
        Hypothesis(
            "mistakes made",
            "share that the auditor finds",
            partial(share, measure="found"),
            more_than=95.0,
            unit="%",
        ),
        Hypothesis(
            "mistakes not made",
            "share that the auditor finds all the same",
            partial(share, measure="alarm"),
            less_than=5.0,
            unit="%",
        ),
        *(
            Hypothesis(
                f"{name} ({mistake.code})",
                "test accuracy that it costs",
                partial(harm, mistake=name),
                more_than=1.0,
                unit="points",
            )
            for name, mistake in MISTAKES.items()
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every mistake."""
        steps = profile.choose(full=200, quick=30)
        for mistake in MISTAKES:
            for seed in range(profile.seeds):
                yield Trial(mistake, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Do it right, then wrong, from the same random numbers."""
        data = digits(trial.seed).to(device)
        make = MISTAKES[trial.mistake].make
        made = []
        for is_wrong in (False, True):
            torch.manual_seed(trial.seed)
            made.append(make(data, trial.steps, trial.seed, is_wrong=is_wrong))
        (right, alarm), (wrong, found) = made
        return {"right": right, "wrong": wrong, "found": found, "alarm": alarm}

    def figure(self, results: Results) -> Figure:
        """What each mistake costs, its rule, and of how many seeds the auditor found it."""
        figure, axes = panels(*KINDS.values(), sharey=True)
        for axis, kind in zip(axes, KINDS, strict=True):
            own = {name: mistake for name, mistake in MISTAKES.items() if mistake.kind == kind}
            labels = []
            for name, mistake in own.items():
                found = [bool(row["found"]) for row in results.where(mistake=name)]
                labels.append(f"{mistake.short}\n{mistake.code}\n{sum(found)} of {len(found)}")
            values = [harm(results, name) for name in own]
            bars(axis, labels, values, arms=["batch"] * len(own))
            axis.tick_params(axis="x", labelsize=7)
            axis.axhline(0, color="#444444", linewidth=0.8)
        axes[0].set_ylabel("test accuracy lost (points)")
        note = "below: the rule, and of how many seeds it found the mistake"
        return finish(figure, len(results.seeds), note=note)

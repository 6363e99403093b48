"""Claim 3: initialization matters less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import digits
from batchnorm.lab.figures import curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Perceptron, PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, train

__all__ = ["LessCarefulInitialization"]

BATCH = 32
CHANCE = 0.1  # accuracy of guessing, which a run that diverged counts with
USUAL = 1.0  # He et al.'s scale
NETWORKS = {
    "perceptron": "perceptron, 4 hidden layers",
    "plain": "plain network, 8 layers",
}
READINGS = {
    "tuned": "rate tuned at each scale",
    "fixed": "rate tuned at scale 1",
}


@dataclass(frozen=True)
class Trial:
    """A training run from weights of He et al.'s initialization times `scale`."""

    network: str
    arm: str
    scale: float
    rate: float
    steps: int
    seed: int


def build(name: str, arm: str, scale: float) -> nn.Module:
    """The network, with batch norm or without."""
    if name == "perceptron":
        norm = norm_of(arm, of="features")
        return Perceptron(norm, inputs=64, depth=4, gain=scale)
    return PlainNetwork(norm_of(arm), depth=8, gain=scale)


def accuracies(results: Results, network: str, arm: str, reading: str) -> dict[float, list[float]]:
    """By scale, the test accuracy of each seed, in percent, at the rate that the reading says."""
    own = results.where(network=network, arm=arm)
    fixed = own.where(scale=USUAL).tuned("rate", by="validation", best="high").distinct("rate")[0]
    found = {}
    for scale in own.distinct("scale"):
        rows = own.where(scale=scale)
        if reading == "tuned":
            rows = rows.tuned("rate", by="validation", best="high")
        else:
            rows = rows.where(rate=fixed)
        found[scale] = [100 * value for value in rows.values("test")]
    return found


def spread(results: Results, network: str, arm: str, reading: str) -> list[float]:
    """The best scale's accuracy less the worst one's, a value a seed."""
    scales = accuracies(results, network, arm, reading).values()
    return [max(each) - min(each) for each in zip(*scales, strict=True)]


def less(results: Results, network: str, reading: str) -> list[float]:
    """The spread without batch norm less that with it."""
    arms = (spread(results, network, arm, reading) for arm in ("none", "batch"))
    return [without - with_norm for without, with_norm in zip(*arms, strict=True)]


class LessCarefulInitialization(Claim[Trial]):
    """Batch norm makes a network depend less on the scale of its initial weights.

    Networks learn scikit-learn's digits (1,000 images, batches of 32, SGD with momentum 0.9, 100
    steps), with batch norm before each ReLU and without it. The weights of their hidden layers
    start as He et al.'s initialization times a scale from 0.1 to 10; biases start at 0, batch
    norm's γ at 1, and the last layer, which has no norm behind it in either arm, as PyTorch's.

    The number is the spread: test accuracy at the best scale less that at the worst, first without
    batch norm, less the same with it. Both arms try the same seven learning rates, and it is read
    twice. *Rate tuned at each scale*: each scale has the rate that is best for it on the validation
    images, of 0.0003 to 0.3, and asks what initialization costs somebody who tunes.
    *Rate tuned at scale 1*: each arm keeps for all scales the rate that is best for He et al.'s,
    which asks what it costs somebody who does not. A run that diverged counts as guessing, 10 %.
    """

    number = 3
    name = "less-careful-initialization"
    source = "Ioffe & Szegedy 2015, sections 1 and 3.3 (the scale of the weights cancels)"
    hypotheses = tuple(
        Hypothesis(
            f"{where}, {how}",
            "spread of test accuracy over scales 0.1 to 10 without batch norm, less that with it",
            partial(less, network=network, reading=reading),
            more_than=10.0,
            unit="points",
        )
        for network, where in NETWORKS.items()
        for reading, how in READINGS.items()
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every network, arm and scale at every rate."""
        scales = profile.choose(full=(0.1, 0.3, 1.0, 3.0, 10.0), quick=(0.1, 1.0, 10.0))
        rates = profile.choose(full=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), quick=(0.03, 0.3))
        steps = profile.choose(full=100, quick=40)
        for network in NETWORKS:
            for arm in ("batch", "none"):
                for scale in scales:
                    for rate in rates:
                        for seed in range(profile.seeds):
                            yield Trial(network, arm, scale, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and measure the accuracies."""
        data = digits(trial.seed).to(device)
        network = build(trial.network, trial.arm, trial.scale).to(device)
        run = train(
            network,
            data.train,
            rate=trial.rate,
            steps=trial.steps,
            batch=BATCH,
            seed=trial.seed,
        )
        return {
            "diverged": run.diverged,
            "validation": CHANCE if run.diverged else accuracy(network, data.validation),
            "test": CHANCE if run.diverged else accuracy(network, data.test),
        }

    def figure(self, results: Results) -> Figure:
        """Accuracy against the scale: a row for each network, a column for each reading."""
        shown = [(name, reading) for name in NETWORKS for reading in READINGS]
        titles = [f"{NETWORKS[name]},\n{READINGS[reading]}" for name, reading in shown]
        figure, axes = panels(*titles, rows=len(NETWORKS), sharey=True)
        for axis, (name, reading) in zip(axes, shown, strict=True):
            for arm in ("batch", "none"):
                found = accuracies(results, name, arm, reading)
                curve(axis, arm, list(found), list(found.values()))
            axis.set_xscale("log")
            axis.set_xlabel("scale of the initial weights (1: He et al.)")
            axis.set_ylabel("accuracy (test, %)")
            axis.set_ylim(0, 102)
        axes[0].legend(loc="lower center")
        return finish(figure, len(results.seeds))

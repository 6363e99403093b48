"""Claim 2: higher learning rates."""

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
from batchnorm.lab.networks import Perceptron, PlainNetwork, ResidualNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, train

__all__ = ["HigherLearningRates"]

TARGET = 0.8
BATCH = 32
GRID = 2.0  # a rate over the next smaller one
NETWORKS = {
    "perceptron": "perceptron, 4 hidden layers",
    "plain": "plain network, 8 layers",
    "deep": "plain network, 12 layers",
    "residual": "residual network, 7 layers",
}


@dataclass(frozen=True)
class Trial:
    """A training run of so many steps."""

    network: str
    arm: str
    rate: float
    steps: int
    seed: int


def build(name: str, arm: str) -> nn.Module:
    """The network, with batch norm or without."""
    if name == "perceptron":
        return Perceptron(norm_of(arm, of="features"), inputs=64, depth=4)
    if name == "residual":
        return ResidualNetwork(norm_of(arm), blocks=3)
    return PlainNetwork(norm_of(arm), depth=8 if name == "plain" else 12)


def largest_stable(results: Results, network: str, arm: str) -> list[float]:
    """The largest stable rate of each seed; where none is, the rate below the smallest tried."""
    own = results.where(network=network, arm=arm)
    below = min(own.distinct("rate")) / GRID
    return [
        max([row["rate"] for row in own.where(seed=seed) if row["stable"]], default=below)
        for seed in own.seeds
    ]


def gain(results: Results, network: str) -> list[float]:
    """The largest stable rate with batch norm, over the next larger one than without it."""
    with_norm = largest_stable(results, network, "batch")
    without = largest_stable(results, network, "none")
    return [high / (GRID * low) for high, low in zip(with_norm, without, strict=True)]


class HigherLearningRates(Claim[Trial]):
    """Batch norm lets a network stand higher learning rates.

    Networks learn scikit-learn's digits (1,000 images, batches of 32, SGD with momentum 0.9, 160
    steps at a constant rate), with batch norm before each ReLU and without it. Without it, they
    have biases and He et al.'s initialization, which is made for that case.

    Both arms try the same ten rates, each twice the one before. A rate is *stable* where the loss
    stays finite and the network, at the end, classifies at least 80 % of the validation images
    right, at inference: so a rate does not count as stood where the network survives it but does
    not learn.

    A grid is coarse: the border lies somewhere between the largest stable rate and the next one.
    So that no border is overstated, the ratio is that of the largest stable rate with batch norm
    over the smallest unstable one above the largest stable one without it; it is half of what the
    two largest stable rates would give. Where no rate is stable, the rate below the smallest tried
    stands for the largest stable one.

    Ioffe & Szegedy raise the rate 5 and 30 times with batch norm, and say that without it a 5
    times higher one does not train. The number takes powers of two alone: where all seeds have
    the same, the interval is a point, and the grid's step is what is not known.

    Changed after pilot runs: 12 layers in place of 20, at which the network without norm trained at
    no rate.
    """

    number = 2
    name = "higher-learning-rates"
    source = "Ioffe & Szegedy 2015, sections 3.3 and 4.2.2; Bjorck et al. 2018, section 2"
    hypotheses = tuple(
        Hypothesis(
            where,
            "largest stable learning rate with batch norm, over the smallest unstable one without",
            partial(gain, network=network),
            more_than=2.0,
            unit="×",
        )
        for network, where in NETWORKS.items()
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every network and arm at every rate."""
        rates = tuple(
            GRID**power for power in profile.choose(full=range(-7, 3), quick=range(-4, 3, 2))
        )
        steps = profile.choose(full=160, quick=50)
        names = profile.choose(full=tuple(NETWORKS), quick=tuple(NETWORKS)[:2])
        for network in names:
            for arm in ("batch", "none"):
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(network, arm, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and see whether it learned."""
        data = digits(trial.seed).to(device)
        network = build(trial.network, trial.arm).to(device)
        run = train(
            network,
            data.train,
            rate=trial.rate,
            steps=trial.steps,
            batch=BATCH,
            seed=trial.seed,
        )
        validation = 0.0 if run.diverged else accuracy(network, data.validation)
        return {
            "diverged": run.diverged,
            "validation": validation,
            "stable": not run.diverged and validation >= TARGET,
        }

    def figure(self, results: Results) -> Figure:
        """Accuracy against the rate, network by network."""
        names = [name for name in NETWORKS if name in results.distinct("network")]
        titles = [NETWORKS[name] for name in names]
        figure, axes = panels(*titles, rows=2 if len(names) > 2 else 1, sharey=True)
        for axis, name in zip(axes, names, strict=True):
            for arm in ("batch", "none"):
                own = results.where(network=name, arm=arm)
                rates = own.distinct("rate")
                found = [own.where(rate=rate).values("validation") for rate in rates]
                curve(axis, arm, rates, [[100 * v for v in values] for values in found])
            axis.axhline(100 * TARGET, color="#666666", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xlabel("learning rate")
            axis.set_ylim(-2, 102)
            axis.set_ylabel("accuracy (validation, %)")
        axes[0].legend(loc="lower left")
        return finish(figure, len(results.seeds), note=f"line: {TARGET:.0%}, the bar of 'stable'")

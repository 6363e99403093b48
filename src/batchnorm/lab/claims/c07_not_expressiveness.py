"""Claim 7: optimization, not expressiveness."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import fold
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.figures import bars, curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Perceptron, PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, evaluated, train

__all__ = ["NotExpressiveness"]

EVERY = 10
MOST = 0.9  # of the labels
ROUNDING = 1e-4  # what float32 may change in a network of many layers
SHOWN = 24  # points of a curve, at most
NETWORKS = {
    "perceptron": "perceptron, 4 hidden layers",
    "plain": "plain network, 8 layers",
}
IMAGES = {"perceptron": 500, "plain": 200}
BATCH = {"perceptron": 64, "plain": 32}


@dataclass(frozen=True)
class Trial:
    """A training run on random labels. `steps`: after which it is given up."""

    network: str
    arm: str
    rate: float
    steps: int
    seed: int


def build(name: str, arm: str) -> nn.Module:
    """The network, with batch norm or without."""
    if name == "perceptron":
        return Perceptron(norm_of(arm, of="features"), inputs=64, depth=4)
    return PlainNetwork(norm_of(arm), depth=8)


def without_norm(network: nn.Module, name: str, example: Float[Tensor, "n *shape"]) -> nn.Module:
    """The network that was built without batch norm, with the folded weights of one with it."""
    folded = copy.deepcopy(network).eval()
    # what folding does to the answers is measured here, so that it does not have to judge it
    fold(folded, example, tolerance=1.0, repeats=0)
    built = build(name, "none").to(example.device)
    own, given = list(built.parameters()), list(folded.parameters())
    with torch.no_grad():
        for parameter, value in zip(own, given, strict=True):
            parameter.copy_(value)
    return built


def moved(network: nn.Module, other: nn.Module, x: Float[Tensor, "n *shape"]) -> float:
    """The largest difference of two networks' logits, over the largest logit of the first."""
    logits = evaluated(network, x)
    return float((logits - evaluated(other, x)).abs().max() / logits.abs().max())


def steps_shown(steps: int) -> list[int]:
    """The noted steps that a run's curve shows."""
    notes = steps // EVERY
    points = min(SHOWN, notes)
    return [EVERY * ((i + 1) * notes // points) for i in range(points)]


def folding(results: Results, network: str) -> list[float]:
    """How far the folded network's logits are away, at batch norm's best rate."""
    return fitted_best(results, network, "batch").values("folded")


def fitted_best(results: Results, network: str, arm: str) -> Results:
    """The trials at the rate at which most labels are fitted in the end."""
    return results.where(network=network, arm=arm).tuned("rate", by="fitted", best="high")


def gap(results: Results, network: str) -> list[float]:
    """The percentage of labels that batch norm's network fits, less that without."""
    arms = (fitted_best(results, network, arm).values("fitted") for arm in ("batch", "none"))
    return [100 * (with_norm - without) for with_norm, without in zip(*arms, strict=True)]


def fastest(results: Results, network: str, arm: str) -> Results:
    """The trials at the rate at which most of the labels are fitted soonest."""
    return results.where(network=network, arm=arm).tuned("rate", by="steps_used", best="low")


def needed(results: Results, network: str, arm: str) -> list[float]:
    """The steps to most of the labels, at the arm's fastest rate."""
    return fastest(results, network, arm).values("steps_used")


def gain(results: Results, network: str) -> list[float]:
    """Steps without batch norm over steps with it, each at its fastest rate."""
    arms = (needed(results, network, arm) for arm in ("none", "batch"))
    return [without / with_norm for without, with_norm in zip(*arms, strict=True)]


class NotExpressiveness(Claim[Trial]):
    """Batch norm acts on optimization, not on expressiveness.

    What a network with batch norm computes at inference, one without it can compute: its scales
    and shifts go into the weights. The claim has three parts, each a number, for two networks.

    *The same function.* Every network trained with batch norm is folded, and its weights are given
    to the network that was built without any norm. The number is the largest difference of their
    logits on 500 test images, over the largest logit: float rounding, no more.

    *The same capacity.* Networks with and without batch norm learn random labels of scikit-learn's
    digits (500 images for the perceptron in batches of 64, 200 for the plain network in batches of
    32), which only capacity can fit (Zhang et al. 2017), until they fit all, or for 1,200 steps of
    SGD with momentum 0.9. The number is the share of labels fitted at inference with batch norm,
    less that without it, each the most that was noted, at the learning rate at which it is most.

    *Not the same optimization.* In the same runs, the number is the steps to 90 % of the labels
    without batch norm over the steps with it, each at the rate at which it needs the fewest on
    average. A run that does not get there counts with all steps it was given.

    Both arms try the same five rates. Random labels have no validation set: there is nothing to
    learn but the labels themselves, and how many can be fitted is the question, so the rates are
    chosen by what is measured.

    Folding is measured at the rate at which most labels are fitted.
    """

    number = 7
    name = "not-expressiveness"
    source = (
        "Ioffe & Szegedy 2015, section 3.1; Santurkar et al. 2018, section 3; "
        "Zhang et al. 2017, section 2, for random labels"
    )
    hypotheses = (
        *(
            Hypothesis(
                where,
                "largest difference of logits after folding into a network without norm, relative",
                partial(folding, network=network),
                less_than=ROUNDING,
            )
            for network, where in NETWORKS.items()
        ),
        *(
            Hypothesis(
                where,
                "random labels fitted in the end with batch norm, less those without it",
                partial(gap, network=network),
                less_than=2.0,
                unit="points",
            )
            for network, where in NETWORKS.items()
        ),
        *(
            Hypothesis(
                where,
                "steps to 90 % of random labels without batch norm, over steps with it",
                partial(gain, network=network),
                more_than=1.5,
                unit="×",
            )
            for network, where in NETWORKS.items()
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every network and arm at every rate."""
        rates = profile.choose(full=(0.003, 0.01, 0.03, 0.1, 0.3), quick=(0.03, 0.1))
        steps = profile.choose(full=1200, quick=60)
        for network in NETWORKS:
            for arm in ("batch", "none"):
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(network, arm, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Fit random labels, and fold what was trained."""
        data = digits(trial.seed).to(device)
        x = data.train.x[: IMAGES[trial.network]]
        generator = torch.Generator().manual_seed(trial.seed)
        examples = Examples(x, torch.randint(0, 10, (len(x),), generator=generator).to(device))
        network = build(trial.network, trial.arm).to(device)
        run = train(
            network,
            examples,
            rate=trial.rate,
            steps=trial.steps,
            batch=BATCH[trial.network],
            seed=trial.seed,
            note=lambda network: accuracy(network, examples),
            every=EVERY,
            until=lambda value: value == 1.0,
        )
        reached = run.first(lambda value: value >= MOST)
        folded, lost = None, None
        if trial.arm == "batch":
            folded, lost = 1.0, 1.0  # of a network whose answers are no numbers
            if not run.diverged:
                other = without_norm(network, trial.network, x)
                folded = moved(network, other, data.test.x)
                lost = abs(accuracy(network, examples) - accuracy(other, examples))
        fits = [value for _, value in run.marks] or [0.0]
        # a run that has ended keeps what it had
        shown = [fits[min(step // EVERY, len(fits)) - 1] for step in steps_shown(trial.steps)]
        return {
            "reached": reached,
            "steps_used": trial.steps if reached is None else reached,
            "fitted": max(fits),
            "folded": folded,
            "lost": lost,
            "curve": shown,
        }

    def figure(self, results: Results) -> Figure:
        """How many labels are fitted over the steps, and what folding changes."""
        figure, axes = panels(*NETWORKS.values(), "folded into a network without norm")
        for axis, name in zip(axes, NETWORKS, strict=False):
            for arm in ("batch", "none"):
                own = fastest(results, name, arm)
                steps = steps_shown(own.rows[0]["steps"])
                fits = zip(*(row["curve"] for row in own), strict=True)
                curve(axis, arm, steps, [[100 * value for value in each] for each in fits])
            axis.axhline(100 * MOST, color="#666666", linewidth=0.8)
            axis.set_xlabel("steps (at the arm's fastest rate)")
            axis.set_ylabel("random labels fitted (%)")
            axis.set_ylim(0, 105)
        axes[0].legend(loc="lower right")
        bars(
            axes[-1],
            ["perceptron", "plain network"],
            [folding(results, name) for name in NETWORKS],
            arms=["batch", "batch"],
            geometric=True,
        )
        axes[-1].axhline(ROUNDING, color="#666666", linewidth=0.8)
        axes[-1].set_yscale("log")
        axes[-1].set_ylim(1e-8, 1e-3)
        axes[-1].set_ylabel("largest relative difference of logits")
        lines = f"lines: {MOST:.0%} of the labels, and a difference of {ROUNDING:g}"
        return finish(figure, len(results.seeds), note=lines)

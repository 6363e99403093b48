"""Claim 17: layer norm, and where which of the two wins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import BatchNorm1d
from batchnorm.lab.claim import Claim
from batchnorm.lab.control import cost, train_policy
from batchnorm.lab.data import CHARACTERS, CartPole, documentation, mnist
from batchnorm.lab.figures import LOOKS, bars, curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.language import nats, train_language
from batchnorm.lab.networks import (
    PlainNetwork,
    RecurrentPolicy,
    ResidualNetwork,
    Transformer,
    norm_of,
)
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import error, evaluated, train

__all__ = ["LayerNorm"]

ARMS = ("batch", "layer")
SIZES = (1, 2, 4, 8, 16, 32, 64)
LENGTH = 32
MOMENTS = 25  # of an episode
VALIDATION, TEST = 900_000_001, 900_000_002  # seeds of episodes: none that is trained on
SUBJECTS = {
    "plain": ("plain network, 8 layers", "test error (%)"),
    "residual": ("residual network, 7 layers", "test error (%)"),
    "transformer": ("transformer, 2 blocks", "test loss (nats a character)"),
    "policy": ("recurrent policy, 4 episodes a batch", "mean cost of a new episode"),
}


@dataclass(frozen=True)
class Trial:
    """A training run; of the subject "layer", passes through a norm that stands alone."""

    subject: str
    arm: str
    rate: float
    steps: int
    seed: int


def changed(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> float:
    """The percentage of values that differ in any bit."""
    bits = (each.contiguous().view(torch.int32) for each in (one, other))
    return 100 * float(torch.ne(*bits).double().mean())


@torch.no_grad()
def changes_with_size(
    norm: nn.Module, x: Float[Tensor, "n *shape"], sizes: Iterable[int]
) -> list[float]:
    """How many percent of a training pass's outputs depend on the size of the batch.

    x is passed in batches of each of the sizes, and compared with the whole.
    """
    norm.train()
    whole = norm(x)
    return [changed(torch.cat([norm(part) for part in x.split(size)]), whole) for size in sizes]


@torch.no_grad()
def changes_with_mode(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> float:
    """How many percent of a network's outputs differ between training and inference."""
    twin = copy.deepcopy(network)
    twin.eval()
    inferred = call(twin)
    twin.train()
    return changed(call(twin), inferred)


def alone(arm: str, seed: int, device: torch.device) -> Outcome:
    """A norm of 16 channels by itself, on features of 64 images and on those of one position."""
    x = evaluated(nn.Conv2d(1, 16, 3, padding=1).to(device), mnist(seed).train.x[:64].to(device))
    outcome: Outcome = {}
    for of, inputs in (("images", x), ("features", x[:, :, 7, 7].contiguous())):
        made = norm_of(arm, of=of)
        assert made is not None
        # one value per channel is what batch norm refuses to train on
        sizes = (2, *SIZES[1:]) if (arm, of) == ("batch", "features") else SIZES
        outcome[of] = changes_with_size(made(16).to(device), inputs, sizes)
    return outcome


def of_images(trial: Trial, device: torch.device) -> Outcome:
    """Classify MNIST."""
    data = mnist(trial.seed).to(device)
    norm = norm_of(trial.arm)
    network = PlainNetwork(norm, depth=8) if trial.subject == "plain" else ResidualNetwork(norm)
    network.to(device)
    train(network, data.train, rate=trial.rate, steps=trial.steps, seed=trial.seed)
    return {
        "validation": error(network, data.validation),
        "test": error(network, data.test),
        "mode": changes_with_mode(network, lambda net: net(data.test.x[:64])),
    }


def of_text(trial: Trial, device: torch.device) -> Outcome:
    """Predict Python's documentation."""
    text = documentation()
    network = Transformer(norm_of(trial.arm, of="sequences"), symbols=CHARACTERS, length=LENGTH)
    network.to(device)
    learned = text.train.to(device)
    train_language(
        network, learned, rate=trial.rate, steps=trial.steps, length=LENGTH, seed=trial.seed
    )
    windows = learned[: 64 * LENGTH].view(64, LENGTH)
    return {
        "validation": nats(network, text.validation.to(device), length=LENGTH),
        "test": nats(network, text.test.to(device), length=LENGTH),
        "mode": changes_with_mode(network, lambda net: net(windows)),
    }


def of_control(trial: Trial, device: torch.device) -> Outcome:
    """Balance the pole."""
    task = CartPole()
    norm = norm_of(trial.arm, of="features")
    if trial.arm == "batch":
        # one layer serves all moments: its running statistics are to be those of whole episodes
        norm = partial(BatchNorm1d, momentum=1 / (10 * MOMENTS))
    policy = RecurrentPolicy(norm).to(device)
    train_policy(policy, task, rate=trial.rate, steps=trial.steps, moments=MOMENTS, seed=trial.seed)
    seen = task.observe(task.start(64, TEST)).to(device)
    memory = seen.new_zeros(64, policy.width)
    return {
        "validation": cost(policy, task, episodes=256, seed=VALIDATION, moments=MOMENTS),
        "test": cost(policy, task, episodes=256, seed=TEST, moments=MOMENTS),
        "mode": changes_with_mode(policy, lambda net: net(seen, memory)[1]),
    }


def reached(results: Results, subject: str, arm: str, measure: str = "test") -> list[float]:
    """What each seed reached at the arm's best learning rate."""
    own = results.where(subject=subject, arm=arm)
    return own.tuned("rate", by="validation", best="low").values(measure)


def ahead(results: Results, subject: str, *, winner: str, loser: str) -> list[float]:
    """By how much the loser's error or loss is the higher."""
    pairs = zip(reached(results, subject, loser), reached(results, subject, winner), strict=True)
    return [worse - better for worse, better in pairs]


def times(results: Results, subject: str, *, winner: str, loser: str) -> list[float]:
    """The loser's cost over the winner's."""
    pairs = zip(reached(results, subject, loser), reached(results, subject, winner), strict=True)
    return [worse / better for worse, better in pairs]


def size_changes(results: Results) -> list[float]:
    """The most that the size of the batch changed of a layer norm's outputs, in percent."""
    own = results.where(subject="layer", arm="layer")
    return [max(*row["images"], *row["features"]) for row in own]


def mode_changes(results: Results, arm: str) -> list[float]:
    """The most that the mode changed of the outputs of any trained network, in percent."""
    own = [row for row in results.where(arm=arm) if row["subject"] != "layer"]
    return [max(row["mode"] for row in own if row["seed"] == seed) for seed in results.seeds]


class LayerNorm(Claim[Trial]):
    """Layer norm ignores the batch and the mode; batch norm wins on images, layer norm elsewhere.

    *To the bit.* A norm of 16 channels is given the features of 64 MNIST images, as images and as
    vectors, in training mode, whole and in batches of 1, 2, …, 64 (for batch norm of vectors 2 at
    least): how many percent of the outputs change in any bit? (A network's convolutions and matrix
    products may round otherwise for another size; the norm is what the law is about.) And of every
    trained network: how many percent of its outputs on one batch differ between training and
    inference? The law says none.

    *Who wins.* A plain and a residual network learn MNIST (3,000 images of 14×14, batches of 64,
    SGD with momentum 0.9; layer norm is over channels and positions), a transformer predicts the
    next character of Python's documentation (batches of 32 windows of 32), and a recurrent policy
    balances a pole that it sees no velocities of, learning through the equations of motion from 4
    new episodes of 25 moments (1 s) a step; transformer and policy learn by Adam, gradients
    clipped to norm 1. Batch norm in the transformer averages over windows and places, in the
    policy over the episodes of a moment, with the same layer for all moments and a momentum by
    which its running statistics are those of some ten batches of episodes. Both arms try the
    same four learning rates and are judged at the best on validation data; what is reported is
    inference on test data (1,000 images, 512 windows, 256 episodes).

    Steps: 240 for images, 400 for text, 120 for the policy. Learning rates: 0.03, 0.1, 0.3 and 1
    for images; 0.001, 0.003, 0.01 and 0.03 for text; 0.0003, 0.003, 0.01 and 0.03 for the policy.

    Changed after pilot runs: shorter episodes, more rates and a smaller momentum for the policy.
    """

    number = 17
    name = "layer-norm"
    source = "Ba, Kiros & Hinton 2016, sections 3, 5.1 and 6; Shen et al. 2020, section 3"
    hypotheses = (
        Hypothesis(
            "layer norm, batches of 1 to 64",
            "outputs that change a bit with the size of the batch",
            size_changes,
            less_than=0.001,
            unit="%",
        ),
        Hypothesis(
            "networks with layer norm",
            "outputs that change a bit between training and inference",
            partial(mode_changes, arm="layer"),
            less_than=0.001,
            unit="%",
        ),
        Hypothesis(
            SUBJECTS["plain"][0],
            "test error with layer norm, minus that with batch norm",
            partial(ahead, subject="plain", winner="batch", loser="layer"),
            more_than=0.5,
            unit="points",
        ),
        Hypothesis(
            SUBJECTS["residual"][0],
            "test error with layer norm, minus that with batch norm",
            partial(ahead, subject="residual", winner="batch", loser="layer"),
            more_than=0.5,
            unit="points",
        ),
        Hypothesis(
            SUBJECTS["transformer"][0],
            "test loss a character with batch norm, minus that with layer norm",
            partial(ahead, subject="transformer", winner="layer", loser="batch"),
            more_than=0.05,
            unit="nats",
        ),
        Hypothesis(
            SUBJECTS["policy"][0],
            "cost of new episodes with batch norm, over that with layer norm",
            partial(times, subject="policy", winner="layer", loser="batch"),
            more_than=1.1,
            unit="×",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """The norm alone, then every network and arm at every rate."""
        for arm in ARMS:
            for seed in range(profile.seeds):
                yield Trial("layer", arm, 0.0, 0, seed)
        sgd = profile.choose(full=(0.03, 0.1, 0.3, 1.0), quick=(0.1,))
        adam = profile.choose(full=(0.001, 0.003, 0.01, 0.03), quick=(0.01,))
        control = profile.choose(full=(0.0003, 0.003, 0.01, 0.03), quick=(0.01,))
        plans = {
            "plain": (sgd, profile.choose(full=240, quick=20)),
            "residual": (sgd, profile.choose(full=240, quick=20)),
            "transformer": (adam, profile.choose(full=400, quick=40)),
            "policy": (control, profile.choose(full=120, quick=8)),
        }
        for subject, (rates, steps) in plans.items():
            for arm in ARMS:
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(subject, arm, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Pass through the norm, or train and test."""
        if trial.subject == "layer":
            return alone(trial.arm, trial.seed, device)
        if trial.subject == "transformer":
            return of_text(trial, device)
        return of_control(trial, device) if trial.subject == "policy" else of_images(trial, device)

    def figure(self, results: Results) -> Figure:
        """What depends on the batch's size, and who wins where."""
        titles = [title for title, _ in SUBJECTS.values()]
        figure, axes = panels("one norm by itself, images", *titles, rows=2)
        for arm in ARMS:
            rows = results.where(subject="layer", arm=arm)
            changes = [[row["images"][i] for row in rows] for i in range(len(SIZES))]
            curve(axes[0], arm, SIZES, changes)
        axes[0].set_xscale("log", base=2)
        axes[0].set_xticks(SIZES, [str(size) for size in SIZES])
        axes[0].set_xlabel("samples in the batch")
        axes[0].set_ylabel("outputs unlike a batch of 64's (%)")
        axes[0].legend()
        for axis, (name, (_, measure)) in zip(axes[1:], SUBJECTS.items(), strict=False):
            values = [reached(results, name, arm) for arm in ARMS]
            bars(axis, [LOOKS[arm].label for arm in ARMS], values, arms=ARMS)
            axis.set_ylabel(measure)
            if name == "policy":
                axis.set_yscale("log")
            axis.margins(y=0.3)
        return finish(figure, len(results.seeds))

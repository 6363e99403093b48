"""Claim 19: poor data stay poor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, breast_cancer, digits
from batchnorm.lab.figures import LOOKS, bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Perceptron, PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, train

__all__ = ["PoorData"]

ARMS = ("batch", "none")
LEAK, REDRAWN = 1000.0, 20
SHARES = {"labels": 0.0, "labels 20 %": 0.2, "labels 40 %": 0.4}
FAULTS = {
    "labels 20 %": ("labels", "20 % of the labels wrong"),
    "labels 40 %": ("labels", "40 % of the labels wrong"),
    "leak": ("scaled", "a leak among scaled features"),
    "unscaled leak": ("unscaled", "a leak among unscaled features"),
    "unscaled": ("scaled", "features unscaled"),
}
"""By the data's fault: the data without it, and its title."""


@dataclass(frozen=True)
class Trial:
    """A training run on data, poor or not; or the mean of one on each of some splits."""

    data: str
    arm: str
    rate: float
    steps: int
    splits: int
    seed: int


def mislabelled(y: Int[Tensor, " n"], share: float, classes: int, seed: int) -> Int[Tensor, " n"]:
    """Each label with that probability one of the others."""
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(len(y), generator=generator) < share
    other = (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
    return torch.where(is_wrong, other, y)


def leaking(part: Examples, said: Int[Tensor, " n"], size: float, seed: int) -> Examples:
    """One feature more, ±`size` with a tenth of noise: what it says is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    told = 2 * said + 0.1 * torch.randn(len(part), generator=generator) - 1
    return Examples(torch.cat([part.x, size * told[:, None]], 1), part.y)


def on_labels(data: str, arm: str, seed: int) -> tuple[nn.Module, list[Examples]]:
    """Digits; the labels to learn and to validate by are wrong, those of the test are right."""
    parts = digits(seed)
    learned, validation = (
        Examples(part.x, mislabelled(part.y, SHARES[data], 10, 2 * seed + i))
        for i, part in enumerate((parts.train, parts.validation))
    )
    return PlainNetwork(norm_of(arm), depth=5), [learned, validation, parts.test]


def on_features(data: str, arm: str, seed: int) -> tuple[nn.Module, list[Examples]]:
    """Tumours; a leak tells the label, and in the test it tosses a coin."""
    is_scaled = not data.startswith("unscaled")
    whole = breast_cancer(seed, standardize=is_scaled)
    parts = [whole.train, whole.validation, whole.test]
    if data.endswith("leak"):
        size = 1.0 if is_scaled else LEAK
        known = [leaking(part, part.y, size, 3 * seed + i) for i, part in enumerate(parts[:2])]
        # tossed many times over, as a coin's luck is not what is measured
        test = whole.test[torch.arange(len(whole.test)).repeat(REDRAWN)]
        coins = torch.randint(0, 2, (len(test),), generator=torch.Generator().manual_seed(seed))
        parts = [*known, leaking(test, coins, size, 3 * seed + 2)]
    norm = norm_of(arm, of="features")
    return Perceptron(norm, inputs=parts[0].x.shape[1], outputs=2), parts


def reached(results: Results, data: str, arm: str) -> list[float]:
    """Test accuracies, in percent, at the arm's best learning rate on these data."""
    own = results.where(data=data, arm=arm).tuned("rate", by="validation", best="high")
    return [100 * value for value in own.values("test")]


def costs(results: Results, fault: str, arm: str) -> list[float]:
    """The points of test accuracy that the fault takes."""
    sound = reached(results, FAULTS[fault][0], arm)
    return [good - poor for good, poor in zip(sound, reached(results, fault, arm), strict=True)]


def saved(results: Results, fault: str) -> list[float]:
    """How many percent of what a fault takes without batch norm, batch norm saves.

    What takes less than a point counts as taking one, so that nothing is divided by zero.
    """
    pairs = zip(costs(results, fault, "none"), costs(results, fault, "batch"), strict=True)
    return [100 * (without - with_norm) / max(without, 1.0) for without, with_norm in pairs]


class PoorData(Claim[Trial]):
    """Batch norm does not make up for poor data: wrong labels, a leak, features left unscaled.

    *Wrong labels.* A plain network of 5 layers learns scikit-learn's digits (1,000 images, 400
    steps of 64), of whose labels 0, 20 or 40 % are wrong, in the validation part as well. *A leak.*
    A perceptron of 3 hidden layers learns to tell tumours apart (300 of them, 200 steps of 32; the
    mean of three splits) by 30 features and one that gives the label away, in the validation part
    as well; in the test it tosses a coin (the mean of 20 tosses). The features are standardized
    and the leak is ±1, or they are left as they were measured, their sizes a factor of 100,000
    apart, and the leak is ±1000. *Unscaled.* The same features as measured, without a leak.

    With batch norm before each ReLU and without it: of the test accuracy that the fault takes
    without it, how much does batch norm save? Labels and features of the test are right but for
    the leak. Both arms learn by SGD with momentum 0.9 at the same learning rates (three for
    images, five powers of ten for tables), each judged at its best on validation data.
    """

    number = 19
    name = "poor-data"
    source = "Zhang et al. 2017, section 2; Ioffe & Szegedy 2015, section 2, for what inputs need"
    hypotheses = tuple(
        Hypothesis(
            title,
            "share of the lost test accuracy that batch norm saves",
            partial(saved, fault=fault),
            less_than=25.0,
            unit="%",
        )
        for fault, (_, title) in FAULTS.items()
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both arms on all data at every rate."""
        images = profile.choose(full=(0.03, 0.1, 0.3), quick=(0.1,))
        powers = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
        tables = profile.choose(full=powers, quick=(1e-4, 1e-2))
        labels = profile.choose(full=tuple(SHARES), quick=("labels", "labels 40 %"))
        plans = [(name, images, profile.choose(full=400, quick=60), 1) for name in labels]
        steps, splits = profile.choose(full=(200, 3), quick=(60, 1))
        features = ("scaled", "leak", "unscaled", "unscaled leak")
        plans += [(name, tables, steps, splits) for name in features]
        for name, rates, steps, splits in plans:
            for arm in ARMS:
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(name, arm, rate, steps, splits, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train on each split, and answer its test."""
        make, batch, chance = (
            (on_labels, 64, 0.1) if trial.data in SHARES else (on_features, 32, 0.5)
        )
        validation, test = 0.0, 0.0
        for i in range(trial.splits):
            network, parts = make(trial.data, trial.arm, trial.splits * trial.seed + i)
            learned, chosen_by, reported = (part.to(device) for part in parts)
            run = train(
                network.to(device),
                learned,
                rate=trial.rate,
                steps=trial.steps,
                batch=batch,
                seed=trial.seed,
            )
            validation += 0.0 if run.diverged else accuracy(network, chosen_by) / trial.splits
            test += (chance if run.diverged else accuracy(network, reported)) / trial.splits
        return {"validation": validation, "test": test}

    def figure(self, results: Results) -> Figure:
        """What each fault takes, with and without batch norm."""
        shown = [fault for fault in FAULTS if fault in results.distinct("data")]
        figure, axes = panels(*(FAULTS[fault][1] for fault in shown), rows=2, sharey=True)
        for axis, fault in zip(axes, shown, strict=False):
            values = [costs(results, fault, arm) for arm in ARMS]
            bars(axis, [LOOKS[arm].label for arm in ARMS], values, arms=ARMS)
            axis.axhline(0, color="#444444", linewidth=0.8)
        for axis in axes[:: -(-len(shown) // 2)]:
            axis.set_ylabel("test accuracy lost (points)")
        return finish(figure, len(results.seeds))

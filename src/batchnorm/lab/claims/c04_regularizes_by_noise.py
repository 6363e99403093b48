"""Claim 4: regularization by the noise of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, recalibrate
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, Split, digits, mnist
from batchnorm.lab.figures import curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Norm, Perceptron, PlainNetwork
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import error, train
from batchnorm.models.norms import batch_norms

__all__ = ["RegularizesByNoise"]

NETWORKS = {"perceptron": "perceptron, MNIST", "plain": "plain network, digits"}
IMAGES = 300  # to train with: few, so that there is a gap
WHOLE = 256  # samples whose statistics count as free of noise
SLICE = 16


@dataclass(frozen=True)
class Trial:
    """A training run.

    `arm`: "ghost" (the loss of all samples, statistics of `size`), "none" (likewise, without norm),
    "small" and "reference" (the loss of `batch` samples, statistics of `size`, those or more).
    """

    network: str
    arm: str
    batch: int
    size: int
    rate: float
    steps: int
    seed: int


class First(nn.Module):
    """A network that, while it trains, is given only the first so many samples of a batch."""

    def __init__(self, network: nn.Module, samples: int) -> None:
        super().__init__()
        self.network = network
        self.samples = samples

    def forward(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "_n classes"]:
        """Logits of them; of all in inference."""
        logits: Tensor = self.network(x[: self.samples] if self.training else x)
        return logits


def few(data: Split) -> tuple[Examples, Examples, Examples]:
    """A few images to train with, the validation's, and all others to test with."""
    rest, test = data.train[slice(IMAGES, None)], data.test
    more = Examples(torch.cat([test.x, rest.x]), torch.cat([test.y, rest.y]))
    return data.train[slice(IMAGES)], data.validation, more


def build(trial: Trial) -> nn.Module:
    """The network with statistics of `size` samples, or without norm."""
    layer = BatchNorm1d if trial.network == "perceptron" else BatchNorm2d
    norm: Norm | None = (
        None if trial.arm == "none" else partial(layer, statistics=Ghost(trial.size))
    )
    if trial.network == "perceptron":
        return Perceptron(norm, inputs=196)
    return PlainNetwork(norm, depth=3)


def tuned(
    results: Results, measure: str, network: str, arm: str, *, batch: int = WHOLE, size: int
) -> list[float]:
    """A measure of each seed at the arm's best learning rate."""
    own = results.where(network=network, arm=arm, batch=batch, size=size)
    return own.tuned("rate", by="validation", best="low").values(measure)


def closed(results: Results, network: str) -> list[float]:
    """How much smaller the gap is with slices than with statistics of the whole batch."""
    whole, slices = (tuned(results, "gap", network, "ghost", size=s) for s in (WHOLE, SLICE))
    return [free - noisy for free, noisy in zip(whole, slices, strict=True)]


def closed_by_own(results: Results, batch: int) -> list[float]:
    """How much smaller a small batch's gap is with its own statistics than with noise-free ones."""
    reference = tuned(results, "gap", "perceptron", "reference", batch=batch, size=WHOLE)
    own = tuned(results, "gap", "perceptron", "small", batch=batch, size=batch)
    return [free - noisy for free, noisy in zip(reference, own, strict=True)]


def per_doubling(results: Results, network: str) -> list[float]:
    """The slope of the gap on log₂ of the slices' size."""
    sizes = results.where(network=network, arm="ghost").distinct("size")
    gaps = [tuned(results, "gap", network, "ghost", size=size) for size in sizes]
    fits = (np.polyfit(np.log2(sizes), each, 1) for each in zip(*gaps, strict=True))
    return [float(fit[0]) for fit in fits]


class RegularizesByNoise(Claim[Trial]):
    """The noise of batch statistics regularizes: it narrows the gap between training and test.

    A perceptron (3 hidden layers) learns 300 images of MNIST, a plain network of 3 layers 300 of
    scikit-learn's digits; the images of the training part that are left join the test. SGD with
    momentum 0.9 and the same number of steps for all.

    *Statistics alone*: every step has the loss of 256 samples, normalized in slices of 4 to 256
    (ghost batch norm). The gradient's samples are the same, the noise of the statistics differs;
    statistics of all 256 (of 300 images) count as free of noise.

    *Small batches*: every step has the loss of 8 to 64 samples; they are normalized with their own
    statistics (batch norm) or, free of noise, with those of 256 samples among which they are. Both
    have the loss of the same samples at each step, drawn in the same order.

    Each arm is tuned over the same four learning rates by its error on the validation images. The
    *gap* is the error on test images minus that on the training images, both in inference, after
    the running statistics have been made those of all training images: those that small batches
    leave behind are noisy themselves. Where all training images are learned the gap is the test
    error.

    Steps: 250. Learning rates: 0.03, 0.1, 0.3 and 1.

    Changed after a first full run was seen: the running statistics are recalibrated before anything
    is measured, and two hypotheses on the test error, which repeated those on the gap, were
    dropped.
    """

    number = 4
    name = "regularizes-by-noise"
    source = (
        "Ioffe & Szegedy 2015, section 3.4; Hoffer et al. 2017, section 4; Luo et al. 2019, "
        '"Towards understanding regularization in batch normalization"'
    )
    hypotheses = (
        *(
            Hypothesis(
                f"{where}, the loss of {WHOLE}",
                f"gap with noise-free statistics, minus that with slices of {SLICE}",
                partial(closed, network=network),
                more_than=0.5,
                unit="points",
            )
            for network, where in NETWORKS.items()
        ),
        Hypothesis(
            f"{NETWORKS['perceptron']}, the loss of {SLICE}",
            "gap with noise-free statistics, minus that with the batch's own",
            partial(closed_by_own, batch=SLICE),
            more_than=0.5,
            unit="points",
        ),
        Hypothesis(
            f"{NETWORKS['perceptron']}, slices of 4 to {WHOLE}",
            "how much the gap grows with each doubling of the slices",
            partial(per_doubling, network="perceptron"),
            more_than=0.1,
            unit="points",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Slices of a large batch, no norm, and small batches, at every rate."""
        rates = profile.choose(full=(0.03, 0.1, 0.3, 1.0), quick=(0.1,))
        steps = profile.choose(full=250, quick=40)
        sizes = {
            "perceptron": profile.choose(full=(4, 8, 16, 32, 64, WHOLE), quick=(SLICE, WHOLE)),
            "plain": profile.choose(full=(4, SLICE, WHOLE), quick=(SLICE, WHOLE)),
        }
        settings: list[tuple[str, str, int, int]] = []
        for network, own in sizes.items():
            settings += ((network, "ghost", WHOLE, size) for size in own)
            settings.append((network, "none", WHOLE, WHOLE))
        for batch in profile.choose(full=(8, SLICE, 64), quick=(SLICE,)):
            settings.append(("perceptron", "small", batch, batch))
            settings.append(("perceptron", "reference", batch, WHOLE))
        for network, arm, batch, size in settings:
            for rate in rates:
                for seed in range(profile.seeds):
                    yield Trial(network, arm, batch, size, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and compare the errors on training and test images."""
        load = mnist if trial.network == "perceptron" else digits
        learned, validation, test = few(load(trial.seed).to(device))
        network = First(build(trial), WHOLE if trial.arm == "reference" else trial.batch).to(device)
        run = train(
            network,
            learned,
            rate=trial.rate,
            steps=trial.steps,
            batch=WHOLE,
            seed=trial.seed,
            loss=lambda logits, y: F.cross_entropy(logits[: trial.batch], y[: trial.batch]),
        )
        if batch_norms(network) and not run.diverged:
            # inference with the statistics of all images: what is left is what was learned
            recalibrate(network.network, [learned.x], progress=False)
        errors = {
            "train": error(network, learned),
            "validation": error(network, validation),
            "test": error(network, test),
        }
        return {**errors, "gap": errors["test"] - errors["train"], "diverged": run.diverged}

    def figure(self, results: Results) -> Figure:
        """The gap and the test error: of slices of a large batch, and of small batches."""
        titles = [f"{name}, loss of {WHOLE}" for name in NETWORKS.values()]
        titles.append(f"{NETWORKS['perceptron']}, small batches")
        figure, axes = panels(*titles, *[""] * 3, rows=2)
        for axis, measure in zip((axes[0], axes[3]), ("gap", "test"), strict=True):
            words = {"gap": "gap, test − training error", "test": "test error"}[measure]
            axis.set_ylabel(f"{words} (points)")
        for first, measure in ((0, "gap"), (3, "test")):
            for axis, network in zip(axes[first:], NETWORKS, strict=False):
                own = results.where(network=network, arm="ghost")
                sizes = own.distinct("size")
                values = [tuned(results, measure, network, "ghost", size=size) for size in sizes]
                curve(axis, "ghost", sizes, values, label="batch norm in slices")
                none = tuned(results, measure, network, "none", size=WHOLE)
                curve(axis, "none", sizes[-1:], [none])
                axis.set_xlabel("samples of a slice")
            _small(axes[first + 2], results, measure)
        for axis in axes:
            axis.set_xscale("log", base=2)
        for axis in axes[:3]:
            axis.legend(fontsize=8)
        return finish(figure, len(results.seeds), note="each arm at its best learning rate")


def _small(axis: Axes, results: Results, measure: str) -> None:
    """Small batches with their own statistics and with noise-free ones."""
    batches = results.where(arm="small").distinct("batch")
    for arm, looks, label in (
        ("small", "batch", "the batch's own statistics"),
        ("reference", "sync", "noise-free statistics"),
    ):
        values = [
            tuned(
                results,
                measure,
                "perceptron",
                arm,
                batch=batch,
                size=batch if arm == "small" else WHOLE,
            )
            for batch in batches
        ]
        curve(axis, looks, batches, values, label=label)
    axis.set_xlabel("samples of a batch")

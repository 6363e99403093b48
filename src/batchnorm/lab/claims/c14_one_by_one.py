"""Claim 14: inference on one sample at a time."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import adapt
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import error, evaluated, hits, train

__all__ = ["OneByOne"]

STREAMS = {
    "clean": "clean",
    "sorted": "clean, class by class",
    "shifted": "low contrast",
    "drifting": "contrast falls",
}
MODES = {"train": "own statistics", "eval": "running", "adapted": "adapted"}
LOWEST, GLOOM = 0.3, 0.5  # contrast, and what is taken from every pixel, in standard deviations


@dataclass(frozen=True)
class Trial:
    """A training run, and what it gives on every stream. `samples`: of each stream."""

    rate: float
    steps: int
    samples: int
    seed: int


def dimmed(x: Float[Tensor, "n *shape"], away: Float[Tensor, " n"]) -> Float[Tensor, "n *shape"]:
    """Images of less contrast and brightness, each so far as `away` says, from 0 to 1."""
    by = away.to(x).view(-1, *[1] * (x.ndim - 1))
    return x * (1 - by * (1 - LOWEST)) - GLOOM * by


def stream(test: Examples, name: str) -> Examples:
    """The test images as a stream that is called so."""
    n = len(test)
    if name == "sorted":
        return test[test.y.argsort(stable=True)]
    if name == "shifted":
        return Examples(dimmed(test.x, torch.ones(n)), test.y)
    if name == "drifting":
        return Examples(dimmed(test.x, torch.linspace(0, 1, n)), test.y)
    return test


def error_one_by_one(network: nn.Module, samples: Examples, mode: str) -> float:
    """The error (%) on samples that come one by one. The network is left as it was."""
    network = deepcopy(network).eval()
    if mode == "adapted":
        adapt(network)
    by = "train" if mode == "train" else "eval"
    return 100 * (1 - hits(evaluated(network, samples.x, mode=by, batch=1), samples.y))


def error_after_stream(network: nn.Module, samples: Examples) -> float:
    """The error (%) of inference after training mode has moved the running statistics."""
    network = deepcopy(network)
    evaluated(network, samples.x, mode="train", batch=1)
    return error(network, samples)


def own(results: Results, measure: str) -> list[float]:
    """A measure of each seed, at the best learning rate."""
    return results.tuned("rate", by="validation", best="low").values(measure)


def difference(results: Results, high: str, low: str) -> list[float]:
    """By how much a measure is above another."""
    return [a - b for a, b in zip(own(results, high), own(results, low), strict=True)]


class OneByOne(Claim[Trial]):
    """One sample at a time needs running statistics, or ones adapted to the stream; not its own.

    A plain network of 4 layers with batch norm learns scikit-learn's digits (1,000 images, batches
    of 64, SGD with momentum 0.9; the best of three learning rates by the error on the validation
    images in inference). Then the test images come one by one, in streams: *clean*, in random
    order; *class by class*; *low contrast*: times 0.3, and half a standard deviation darker; and
    *contrast falls*, from clean to that, linearly over the stream.

    The same network is read in three ways: in training mode, where each image is normalized by its
    own mean and variance over positions; in inference; and adapted, `batchnorm.adapt` with its
    defaults (128 samples stand for the running statistics, the stream counts for at most 256, the
    mean may move one and the deviation by a factor of two). Errors are of all images of a stream.
    *Afterwards* is inference after the clean stream has passed in training mode, which moves the
    running statistics at every sample.

    Steps: 300. Learning rates: 0.03, 0.1 and 0.3.
    """

    number = 14
    name = "one-by-one"
    source = (
        "Ioffe & Szegedy 2015, section 3.1 (inference); Schneider et al. 2020, section 3 "
        "(adaptation); Gong et al. 2022 (streams whose classes come in runs)"
    )
    hypotheses = (
        Hypothesis(
            "clean stream",
            "error by each sample's own statistics above that by running ones",
            partial(difference, high="train_clean", low="eval_clean"),
            more_than=10.0,
            unit="points",
        ),
        Hypothesis(
            "after a clean stream in training mode",
            "error of inference above that before",
            partial(difference, high="afterwards", low="eval_clean"),
            more_than=1.0,
            unit="points",
        ),
        Hypothesis(
            "clean stream",
            "error by adapted statistics above that by running ones",
            partial(difference, high="adapted_clean", low="eval_clean"),
            less_than=1.0,
            unit="points",
        ),
        Hypothesis(
            "clean stream, class by class",
            "error by adapted statistics above that by running ones",
            partial(difference, high="adapted_sorted", low="eval_sorted"),
            more_than=1.0,
            unit="points",
        ),
        *(
            Hypothesis(
                STREAMS[name],
                "error by running statistics above that by adapted ones",
                partial(difference, high=f"eval_{name}", low=f"adapted_{name}"),
                more_than=5.0,
                unit="points",
            )
            for name in ("shifted", "drifting")
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """One network at three learning rates."""
        steps = profile.choose(full=300, quick=80)
        samples = profile.choose(full=500, quick=100)
        for rate in profile.choose(full=(0.03, 0.1, 0.3), quick=(0.1,)):
            for seed in range(profile.seeds):
                yield Trial(rate, steps, samples, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and read every stream in every way."""
        data = digits(trial.seed).to(device)
        network = PlainNetwork(norm_of("batch"), depth=4).to(device)
        train(network, data.train, rate=trial.rate, steps=trial.steps, seed=trial.seed)
        test = data.test[: trial.samples]
        return {
            "validation": error(network, data.validation),
            "afterwards": error_after_stream(network, test),
            **{
                f"{mode}_{name}": error_one_by_one(network, stream(test, name), mode)
                for name in STREAMS
                for mode in MODES
            },
        }

    def figure(self, results: Results) -> Figure:
        """Errors of every stream, by whose statistics."""
        figure, axes = panels(*(STREAMS[name] for name in STREAMS), rows=2, sharey=True)
        for axis, name in zip(axes, STREAMS, strict=True):
            values = [own(results, f"{mode}_{name}") for mode in MODES]
            bars(axis, list(MODES.values()), values, arms=["instance", "batch", "group"])
            axis.set_ylim(bottom=0)
            axis.set_ylabel("test error (%)")
        return finish(figure, len(results.seeds))

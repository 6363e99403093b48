"""Claim 12: batches that are not drawn alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import (
    Batch,
    BatchNorm2d,
    Ghost,
    Ramp,
    Renorm,
    freeze,
    frozen_statistics,
    recalibrate,
)
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, batches, digits
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Norm, PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import error, evaluated, hits, train
from batchnorm.statistics import Statistics

__all__ = ["SortedBatches"]

BATCH = 32
CLASSES = 2  # in a sorted batch
SLICE = BATCH // CLASSES  # of ghost batch norm: one class of a sorted batch
ARMS = ("batch", "ghost", "renorm", "frozen", "group")
MOMENTUM = 0.05  # a sorted batch has 2 classes of 10: the average has to reach over many


@dataclass(frozen=True)
class Trial:
    """A training run, on batches in an order: "sorted" or "shuffled"."""

    arm: str
    order: str
    rate: float
    steps: int
    seed: int


def sorted_batches(
    labels: Int[Tensor, " n"], size: int, classes: int, seed: int
) -> Iterator[Int[Tensor, " size"]]:
    """The indices of batches without end, each with as many samples of each of a few classes.

    The classes of a batch and its samples are drawn anew for each.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels.cpu() == label).nonzero()[:, 0] for label in labels.unique().tolist()]
    while True:
        chosen = torch.randperm(len(members), generator=generator)[:classes]
        parts = [members[int(c)] for c in chosen]
        yield torch.cat(
            [
                part[torch.randperm(len(part), generator=generator)[: size // classes]]
                for part in parts
            ]
        )


def norm(arm: str, steps: int) -> Norm | None:
    """What makes an arm's layers; batch renorm's ramp is the paper's, in parts of the run."""
    if arm == "group":
        return norm_of("group")
    begin = steps // 32
    policies: dict[str, Statistics] = {
        "ghost": Ghost(SLICE),
        "renorm": Renorm(Ramp(1.0, 3.0, begin, steps // 4), Ramp(0.0, 5.0, begin, steps // 6)),
    }
    return partial(BatchNorm2d, statistics=policies.get(arm, Batch()), momentum=MOMENTUM)


def error_by_batch(network: nn.Module, examples: Examples, order: str, seed: int) -> float:
    """The error (%) of training mode, each batch of 32 by its own statistics; 640 samples."""
    with frozen_statistics(network):
        drawn = islice(indices(examples, order, seed), 20)
        parts = [examples[chosen.to(examples.x.device)] for chosen in drawn]
        right = [hits(evaluated(network, part.x, mode="train"), part.y) for part in parts]
    return 100 * (1 - sum(right) / len(right))


def indices(examples: Examples, order: str, seed: int) -> Iterator[Int[Tensor, " size"]]:
    """The batches of an order."""
    if order == "sorted":
        return sorted_batches(examples.y, BATCH, CLASSES, seed)
    return batches(len(examples), BATCH, seed)


def own(results: Results, arm: str, order: str, measure: str = "test") -> list[float]:
    """A measure of each seed, at the best learning rate of the arm, recalibrated or not."""
    by = "validation_recalibrated" if measure == "recalibrated" else "validation"
    chosen = results.where(arm=arm, order=order).tuned("rate", by=by, best="low")
    return chosen.values(measure)


def above(results: Results, arm: str, measure: str = "test") -> list[float]:
    """An arm's error on sorted batches above batch norm's on shuffled ones."""
    pairs = zip(
        own(results, arm, "sorted", measure), own(results, "batch", "shuffled"), strict=True
    )
    return [arms - shuffled for arms, shuffled in pairs]


def lost(results: Results) -> list[float]:
    """Batch norm's error in inference above the one that sorted batches' own statistics give."""
    pairs = zip(
        own(results, "batch", "sorted"), own(results, "batch", "sorted", "by_batch"), strict=True
    )
    return [inference - by_batch for inference, by_batch in pairs]


SHOWN = "test error above batch norm's on shuffled batches"


class SortedBatches(Claim[Trial]):
    """Batch norm fails on class-sorted batches; batch renorm, freezing and group norm cure it.

    A plain network of 4 layers learns scikit-learn's digits in batches of 32 (SGD, momentum 0.9).
    A *sorted* batch has 16 samples of each of 2 classes, drawn anew for every batch, side by side;
    a *shuffled* one is drawn from all. Every arm is tested on all test images in inference; "by the
    sorted batch's own statistics" is training mode on test images in sorted batches.

    Arms: batch norm; ghost batch norm, in slices of 16, each of one class; batch renorm with the
    paper's ramp (r up to 3 and d up to 5, in a quarter and a sixth of the run); *frozen*, batch
    norm up to three quarters of the run, then recalibrated on shuffled training images and frozen,
    so that the rest of the training sees what inference will; group norm of 4 channels.
    *Recalibrated* is the batch norm arm after its running statistics have been made those of the
    shuffled training images. All running statistics have momentum 0.05.

    Every arm tries the same four learning rates and is judged at the one with the smallest mean
    error on the validation images, in inference.

    Steps: 400. Learning rates: 0.003, 0.01, 0.03 and 0.1. The recalibrated network is judged at the
    rate that is best for it when it has been recalibrated.

    Changed after pilot runs: smaller rates, and at which of them the recalibrated network is
    judged.
    """

    number = 12
    name = "sorted-batches"
    source = "Ioffe 2017, section 4.3 (non-i.i.d. minibatches); Wu & Johnson 2021, sections 4 and 6"
    hypotheses = (
        Hypothesis("batch norm", SHOWN, partial(above, arm="batch"), more_than=5.0, unit="points"),
        Hypothesis(
            "batch norm",
            "test error in inference above that by the sorted batch's own statistics",
            lost,
            more_than=5.0,
            unit="points",
        ),
        Hypothesis(
            "recalibrated on shuffled images, no cure",
            SHOWN,
            partial(above, arm="batch", measure="recalibrated"),
            more_than=5.0,
            unit="points",
        ),
        *(
            Hypothesis(where, SHOWN, partial(above, arm=arm), less_than=2.0, unit="points")
            for arm, where in (
                ("renorm", "batch renorm, a cure"),
                ("frozen", "statistics frozen after 3/4 of the run, a cure"),
                ("group", "group norm, a cure"),
            )
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every arm on sorted batches, and batch norm and group norm on shuffled ones."""
        rates = profile.choose(full=(0.003, 0.01, 0.03, 0.1), quick=(0.03,))
        steps = profile.choose(full=400, quick=128)
        runs = [(arm, "sorted") for arm in ARMS] + [("batch", "shuffled"), ("group", "shuffled")]
        for arm, order in runs:
            for rate in rates:
                for seed in range(profile.seeds):
                    yield Trial(arm, order, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and test in inference, by the batch, and recalibrated."""
        data = digits(trial.seed).to(device)
        network = PlainNetwork(norm(trial.arm, trial.steps), depth=4).to(device)
        order = indices(data.train, trial.order, trial.seed)
        pieces = data.train.x.split(100)
        first = trial.steps * 3 // 4 if trial.arm == "frozen" else trial.steps
        train(network, data.train, rate=trial.rate, steps=first, order=order)
        if trial.arm == "frozen":
            recalibrate(network, pieces, progress=False)
            freeze(network, learns=True)
            train(network, data.train, rate=trial.rate, steps=trial.steps - first, order=order)
        outcome: Outcome = {
            "validation": error(network, data.validation),
            "test": error(network, data.test),
            "by_batch": error_by_batch(network, data.test, trial.order, trial.seed),
        }
        if trial.arm in ("batch", "ghost", "renorm"):
            recalibrate(network, pieces, progress=False)
        return {
            **outcome,
            "recalibrated": error(network, data.test),
            "validation_recalibrated": error(network, data.validation),
        }

    def figure(self, results: Results) -> Figure:
        """Errors of all arms, and of two of them by whose statistics they are normalized."""
        figure, axes = panels(
            "Trained on sorted batches", "Batch norm, by whose statistics", "Ghost, by whose"
        )
        values = [own(results, arm, "sorted") for arm in ARMS]
        bars(axes[0], ARMS, values, arms=["batch", "ghost", "renorm", "none", "group"])
        reference = own(results, "batch", "shuffled")
        axes[0].axhline(sum(reference) / len(reference), color="black", linestyle=":", linewidth=1)
        axes[0].set_ylabel("test error (%)")
        measures = {
            "running": "test",
            "recalibrated": "recalibrated",
            "sorted batch's": "by_batch",
        }
        for axis, arm in zip(axes[1:], ("batch", "ghost"), strict=True):
            by_whose = [own(results, arm, "sorted", measure) for measure in measures.values()]
            bars(axis, list(measures), by_whose, arms=[arm] * len(measures))
        for axis in axes:
            axis.set_ylim(bottom=0)
        return finish(figure, len(results.seeds), note="dotted: batch norm on shuffled batches")

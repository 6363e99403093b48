"""Claim 15: what a sample's neighbours in the batch tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import frozen_statistics
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.figures import bars, curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import error, evaluated, train

__all__ = ["LeaksAcrossSamples"]

BATCH, GROUPS = 32, 8
FEW, MANY = 4, 16  # companions of a batch


@dataclass(frozen=True)
class Trial:
    """A training run: on digits, or with so many companions that tell a label."""

    arm: str
    companions: int
    rate: float
    steps: int
    seed: int


def told_by_companions(
    digit: Int[Tensor, " n"], companions: int, seed: int
) -> Iterator[Int[Tensor, " batch"]]:
    """The indices of batches without end: probes, then companions, all zeros or all ones.

    A coin decides which, of two batches each the first one's, so that both are as frequent; the
    probes are drawn from all digits, whatever the coin says.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [(digit.cpu() == side).nonzero()[:, 0] for side in (0, 1)]

    def draw(among: Tensor, many: int) -> Tensor:
        return among[torch.randperm(len(among), generator=generator)[:many]]

    while True:
        for side in torch.randperm(2, generator=generator).tolist():
            probes = draw(torch.arange(len(digit)), BATCH - companions)
            yield torch.cat([probes, draw(sides[side], companions)])


def label(digit: Int[Tensor, " n"], companions: int) -> Int[Tensor, " probes"]:
    """Of every probe: what the coin said, which the companions are of."""
    return digit[-1].expand(len(digit) - companions)


def probes_loss(
    logits: Float[Tensor, "n classes"], digit: Int[Tensor, " n"], *, companions: int
) -> Float[Tensor, ""]:
    """The cross-entropy of the probes alone."""
    return F.cross_entropy(logits[:-companions], label(digit, companions))


def probes_accuracy(
    network: nn.Module, examples: Examples, companions: int, mode: str, seed: int
) -> float:
    """The percentage of probes whose label is told right, in 60 batches."""
    right = []
    with frozen_statistics(network):
        for chosen in islice(told_by_companions(examples.y, companions, seed), 60):
            part = examples[chosen.to(examples.x.device)]
            answers = evaluated(network, part.x, mode=mode)[:-companions].argmax(1)
            right.append(float((answers == label(part.y, companions)).double().mean()))
    return 100 * sum(right) / len(right)


def movement(
    network: nn.Module, x: Float[Tensor, "n *shape"], mode: str, seed: int
) -> tuple[float, float]:
    """How much 8 samples' logits differ between 8 groups of neighbours, and how often answers do.

    Returns:
        The standard deviation over neighbours over that over samples, of all logits; and the
        percentage of pairs of groups between which a sample's answer differs.
    """
    generator = torch.Generator().manual_seed(seed)
    watched, others = x[:8], x[8:]
    logits = []
    with frozen_statistics(network):
        for _ in range(GROUPS):
            drawn = torch.randperm(len(others), generator=generator)[: BATCH - len(watched)]
            whole = torch.cat([watched, others[drawn.to(x.device)]])
            logits.append(evaluated(network, whole, mode=mode)[: len(watched)].double())
    found = torch.stack(logits)  # (groups, samples, classes)
    over_neighbours = (found - found[0]).var(0).mean().sqrt()  # exactly 0 where nothing moves
    over_samples = found.mean(0).var(0).mean().sqrt().clamp(min=1e-30)
    answers = found.argmax(2)
    differ = (answers[:, None] != answers[None]).double().sum((0, 1)) / (GROUPS * (GROUPS - 1))
    return float(over_neighbours / over_samples), 100 * float(differ.mean())


def own(results: Results, arm: str, companions: int, measure: str) -> list[float]:
    """A measure of each seed, at the arm's best learning rate."""
    chosen = results.where(arm=arm, companions=companions)
    return chosen.tuned("rate", by="validation", best="low").values(measure)


class LeaksAcrossSamples(Claim[Trial]):
    """Batch norm lets a sample's neighbours move its output, and a label be read off them.

    A plain network of 4 layers learns scikit-learn's digits (batches of 32, SGD with momentum 0.9),
    with batch norm or with group norm of 4 channels. Both try the same four learning rates.

    *Moved*: 8 test images stand in 8 batches, each time with 24 other neighbours. How much do their
    logits differ between the batches: the standard deviation over neighbours, over that over
    samples.

    *Read off*: a coin is thrown for every batch, and is the label of all its probes, which are
    drawn at random. The others, the companions, are all zeros for heads and all ones for tails;
    they have no part in the loss. Nothing in a probe tells its label; a network that looks at a
    sample alone is right in half of the cases. Measured on test images, in training mode and in
    inference. Rates are chosen by the error on validation images: of the digits in inference, of
    the probes' labels in training mode, in which they are learned.

    Steps: 400. Learning rates: 0.01, 0.03, 0.1 and 0.3.

    Changed after pilot runs, which told hardly anything: the companions are zeros or ones, in place
    of even or odd digits, and as many batches have one label as the other.
    """

    number = 15
    name = "leaks-across-samples"
    source = "He et al. 2020, section 3.3 (shuffling BN); Wu & Johnson 2021, section 6"
    hypotheses = (
        Hypothesis(
            "batch norm in training mode",
            "moved by neighbours, over the spread of samples",
            partial(own, arm="batch", companions=0, measure="moved_train"),
            more_than=0.05,
        ),
        *(
            Hypothesis(
                where,
                "moved by neighbours, over the spread of samples",
                partial(own, arm=arm, companions=0, measure=measure),
                less_than=1e-9,
            )
            for where, arm, measure in (
                ("batch norm in inference", "batch", "moved_eval"),
                ("group norm in training mode", "group", "moved_train"),
            )
        ),
        *(
            Hypothesis(
                f"batch norm in training mode, {companions} companions of {BATCH}",
                "probes whose label is told right",
                partial(own, arm="batch", companions=companions, measure="train"),
                more_than=bar,
                unit="%",
            )
            for companions, bar in ((MANY, 90.0), (FEW, 60.0))
        ),
        Hypothesis(
            f"batch norm in inference, {MANY} companions of {BATCH}",
            "probes whose label is told right",
            partial(own, arm="batch", companions=MANY, measure="eval"),
            less_than=60.0,
            unit="%",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both norms, on digits and with few and many companions."""
        rates = profile.choose(full=(0.01, 0.03, 0.1, 0.3), quick=(0.1,))
        steps = profile.choose(full=400, quick=100)
        for arm in ("batch", "group"):
            for companions in profile.choose(full=(0, FEW, 8, MANY), quick=(0, FEW, MANY)):
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(arm, companions, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and read with other neighbours or with companions."""
        data = digits(trial.seed).to(device)
        many, seed = trial.companions, trial.seed
        network = PlainNetwork(norm_of(trial.arm), depth=4, classes=2 if many else 10).to(device)
        learn = partial(
            train, network, data.train, rate=trial.rate, steps=trial.steps, batch=BATCH, seed=seed
        )
        if not many:
            learn()
            moved, differ = movement(network, data.test.x, "train", seed)
            return {
                "validation": error(network, data.validation),
                "moved_train": moved,
                "differ_train": differ,
                "moved_eval": movement(network, data.test.x, "eval", seed)[0],
            }
        learn(
            loss=partial(probes_loss, companions=many),
            order=told_by_companions(data.train.y, many, seed),
        )
        return {
            "validation": 100 - probes_accuracy(network, data.validation, many, "train", seed),
            **{
                mode: probes_accuracy(network, data.test, many, mode, seed)
                for mode in ("train", "eval")
            },
        }

    def figure(self, results: Results) -> Figure:
        """How far neighbours move an output, and how much companions tell."""
        figure, axes = panels("Moved by neighbours", "Label read off companions")
        moved = {
            "batch norm,\ntraining": own(results, "batch", 0, "moved_train"),
            "batch norm,\ninference": own(results, "batch", 0, "moved_eval"),
            "group norm,\ntraining": own(results, "group", 0, "moved_train"),
        }
        bars(axes[0], list(moved), list(moved.values()), arms=["batch", "batch", "group"])
        axes[0].set_ylabel("over the spread of samples")
        sizes = [size for size in results.distinct("companions") if size]
        for name, arm, mode in (
            ("batch norm, training mode", "batch", "train"),
            ("batch norm, inference", "batch", "eval"),
            ("group norm", "group", "train"),
        ):
            values = [own(results, arm, size, mode) for size in sizes]
            drawn = "none" if mode == "eval" else arm
            curve(axes[1], drawn, sizes, values, label=name)
        axes[1].axhline(50, color="black", linestyle=":", linewidth=1)
        axes[1].set_xticks(sizes)
        axes[1].set_xlabel(f"companions in a batch of {BATCH}")
        axes[1].set_ylabel("probes told right (%)")
        axes[1].legend(loc="center right", fontsize=7)
        return finish(figure, len(results.seeds), note="dotted: by chance")

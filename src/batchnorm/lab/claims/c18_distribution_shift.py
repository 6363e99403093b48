"""Claim 18: a shift between training and inference, before and after adaptation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import adapt, recalibrate
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, mnist
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, hits, train

__all__ = ["DistributionShift"]

Images = Float[Tensor, "n 1 h w"]
FEW = 3  # classes that are left where the labels shift
STREAM = 16  # images at a time
SHIFTS = {
    "contrast": "contrast × 0.3",
    "brightness": "brighter by 1 standard deviation",
    "noise": "noise of 1 standard deviation",
    "blur": "blurred over 1.2 pixels",
}
LABELS = "three digits alone, not shifted"


@dataclass(frozen=True)
class Trial:
    """A training run, after which its network meets all shifts."""

    arm: str
    rate: float
    steps: int
    seed: int


def contrast(x: Images, seed: int) -> Images:
    """Each image's values drawn together to 0.3 of their distance from its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + 0.3 * (x - mean)


def brightness(x: Images, seed: int) -> Images:
    """All values higher by one standard deviation of all images."""
    return x + 1


def noise(x: Images, seed: int) -> Images:
    """Normal noise of one standard deviation in each pixel."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + drawn.to(x.device)


def blur(x: Images, seed: int) -> Images:
    """A Gaussian's average of 5×5 pixels, its standard deviation 1.2 pixels."""
    line = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * 1.2**2))
    kernel = (line[:, None] * line / line.sum() ** 2).view(1, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel.to(x.device))


CHANGES: dict[str, Callable[[Images, int], Images]] = {
    "contrast": contrast,
    "brightness": brightness,
    "noise": noise,
    "blur": blur,
}


def recalibrated(network: nn.Module, unlabelled: Images, test: Examples) -> float:
    """The accuracy with the running statistics of other images of the same kind."""
    twin = copy.deepcopy(network).eval()
    recalibrate(twin, [unlabelled], progress=False)
    return accuracy(twin, test)


def online(network: nn.Module, test: Examples) -> float:
    """The accuracy of a stream of 16 images at a time, to which the network adapts as it goes."""
    with adapt(copy.deepcopy(network).eval()) as adaptation, torch.no_grad():
        answers = [adaptation(part) for part in test.x.split(STREAM)]
    return hits(torch.cat(answers), test.y)


def regained(results: Results, shift: str, way: str) -> list[float]:
    """How many percent of the accuracy that a shift took an adaptation brings back.

    A shift that takes less than a point counts as taking one, so that nothing is divided by zero.
    """
    own = tuned(results, "batch")
    triples = zip(
        own.values("clean_eval"),
        own.values(f"{shift}_eval"),
        own.values(f"{shift}_{way}"),
        strict=True,
    )
    return [100 * (after - before) / max(clean - before, 0.01) for clean, before, after in triples]


def regained_online(results: Results) -> list[float]:
    """The same of the stream, the mean of all shifts."""
    shares = [regained(results, shift, "online") for shift in SHIFTS]
    return [sum(each) / len(shares) for each in zip(*shares, strict=True)]


def harm(results: Results) -> list[float]:
    """The points of accuracy that recalibration costs where only the labels shifted."""
    own = tuned(results, "batch")
    pairs = zip(own.values("labels_eval"), own.values("labels_recalibrated"), strict=True)
    return [100 * (before - after) for before, after in pairs]


def tuned(results: Results, arm: str) -> Results:
    """An arm's runs at the rate that is best on clean validation images."""
    return results.where(arm=arm).tuned("rate", by="validation", best="high")


class DistributionShift(Claim[Trial]):
    """A shift at inference breaks the running statistics; the shifted data's own repair it.

    A plain network of 6 layers with batch norm learns MNIST (3,000 images of 14×14, batches of 64,
    SGD with momentum 0.9; of four learning rates the best on clean validation images). Then it
    answers the 1,000 test images: clean, with less contrast, brighter, noisy and blurred, with its
    own running statistics; *recalibrated* on the validation images under the same shift, whose
    labels are not used; and *online*, where `batchnorm.adapt` with its defaults sees no other
    images than those it answers, 16 at a time in mixed order. Of the accuracy that a shift takes,
    how much comes back?

    Where not the images but their labels shift, the same recalibration should harm: of the test
    images those of three digits are answered before and after recalibration on the validation
    images of the same three. The network with group norm, tuned alike, has no statistics to shift
    and stands beside.

    Steps: 300. Learning rates: 0.03, 0.1, 0.3 and 1.
    """

    number = 18
    name = "distribution-shift"
    source = "Schneider et al. 2020, sections 3 and 5; Nado et al. 2020, sections 4 and 5"
    hypotheses = (
        *(
            Hypothesis(
                title,
                "share of the lost accuracy that recalibration brings back",
                partial(regained, shift=shift, way="recalibrated"),
                more_than=50.0,
                unit="%",
            )
            for shift, title in SHIFTS.items()
        ),
        Hypothesis(
            "all four shifts, online",
            "share of the lost accuracy that adaptation brings back, in the mean",
            regained_online,
            more_than=50.0,
            unit="%",
        ),
        Hypothesis(
            LABELS,
            "accuracy that recalibration costs",
            harm,
            more_than=2.0,
            unit="points",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both norms at every rate."""
        rates = profile.choose(full=(0.03, 0.1, 0.3, 1.0), quick=(0.1,))
        steps = profile.choose(full=300, quick=40)
        for arm in ("batch", "group"):
            for rate in rates:
                for seed in range(profile.seeds):
                    yield Trial(arm, rate, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, then shift."""
        data = mnist(trial.seed).to(device)
        network = PlainNetwork(norm_of(trial.arm), depth=6).to(device)
        train(network, data.train, rate=trial.rate, steps=trial.steps, seed=trial.seed)
        network.eval()
        outcome: Outcome = {
            "validation": accuracy(network, data.validation),
            "clean_eval": accuracy(network, data.test),
        }
        targets = {
            name: (change(data.validation.x, 1), Examples(change(data.test.x, 2), data.test.y))
            for name, change in CHANGES.items()
        }
        targets["labels"] = (
            data.validation.x[data.validation.y < FEW],
            data.test[data.test.y < FEW],
        )
        for name, (unlabelled, test) in targets.items():
            outcome[f"{name}_eval"] = accuracy(network, test)
            if trial.arm == "batch":
                outcome[f"{name}_recalibrated"] = recalibrated(network, unlabelled, test)
                outcome[f"{name}_online"] = online(network, test)
        return outcome

    def figure(self, results: Results) -> Figure:
        """Accuracy under each shift, by what is done about it."""
        titles = {"clean": "clean", **SHIFTS, "labels": LABELS}
        figure, axes = panels(*titles.values(), rows=2, sharey=True)
        batch, group = tuned(results, "batch"), tuned(results, "group")
        for axis, name in zip(axes, titles, strict=True):
            shown = {"as\ntrained": batch.values(f"{name}_eval")}
            if name != "clean":
                shown["recali-\nbrated"] = batch.values(f"{name}_recalibrated")
                shown["online"] = batch.values(f"{name}_online")
            shown["group\nnorm"] = group.values(f"{name}_eval")
            percent = [[100 * value for value in each] for each in shown.values()]
            bars(axis, list(shown), percent, arms=[*["batch"] * (len(shown) - 1), "group"])
            axis.set_ylim(0, 102)
        for axis in axes[::3]:
            axis.set_ylabel("test accuracy (%)")
        return finish(figure, len(results.seeds))

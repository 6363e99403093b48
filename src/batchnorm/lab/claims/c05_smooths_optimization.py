"""Claim 5: smoother optimization."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.figures import finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.looks import LEARNED, LEAST, READINGS, draw, looked_at, ratio
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results

__all__ = ["SmoothsOptimization"]

DEPTH = 8
STEPS_ALONG = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # times the learning rate
MEASURES = {
    "variation": "range of the loss along the gradient",
    "change": "largest change of the gradient along itself",
    "smoothness": "effective β-smoothness",
}


@dataclass(frozen=True)
class Trial:
    """A training run, looked at `looks` times."""

    arm: str
    rate: float
    steps: int
    looks: int
    seed: int


def norm_between(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The ℓ2 distance of two points, or gradients, each in the parts of the parameters."""
    return math.sqrt(
        sum(float((a - b).double().square().sum()) for a, b in zip(first, second, strict=True))
    )


def along(network: nn.Module, part: Examples, rate: float) -> dict[str, float]:
    """What loss and gradient of a batch do on steps along the gradient; the network stays as it is.

    With g the gradient at θ, of all parameters, in training mode, and points θ − k·rate·g for the
    k of `STEPS_ALONG`: the loss at θ; the largest loss there less the smallest; the largest
    ‖g − g′‖; and the largest ‖g − g′‖ / ‖θ − θ′‖. All infinite if a number there is none.
    """
    network = copy.deepcopy(network).train()
    parameters = list(network.parameters())

    def measured() -> tuple[float, tuple[Tensor, ...]]:
        loss = F.cross_entropy(network(part.x), part.y)
        return float(loss.detach()), torch.autograd.grad(loss, parameters)

    start = [parameter.detach().clone() for parameter in parameters]
    before, gradient = measured()
    length = norm_between(gradient, [torch.zeros_like(g) for g in gradient])
    losses, changes, slopes = [], [], []
    for step in STEPS_ALONG:
        with torch.no_grad():
            for parameter, origin, g in zip(parameters, start, gradient, strict=True):
                parameter.copy_(origin - step * rate * g)
        loss, other = measured()
        losses.append(loss)
        changes.append(norm_between(gradient, other))
        slopes.append(changes[-1] / max(step * rate * length, LEAST))
    if not all(map(math.isfinite, (*losses, *changes))):  # max and min may miss a NaN
        return {"loss": before, **dict.fromkeys(MEASURES, math.inf)}
    return {
        "loss": before,
        "variation": max(losses) - min(losses),
        "change": max(changes),
        "smoothness": max(slopes),
    }


class SmoothsOptimization(Claim[Trial]):
    """Batch norm makes the optimization landscape smoother along the steps of training.

    A plain network of 8 layers learns scikit-learn's digits (1,000 images, batches of 64, SGD
    without momentum, so that a step is a step along the gradient, 240 steps), with batch norm
    before each ReLU and without it. Every 10 steps, on a batch of 64 training images, the gradient
    g of all parameters is taken, and then loss and gradient at steps of 0.5 to 4 learning rates
    along −g, as Santurkar et al. do. Three measures, each smaller the smoother it is:

    - the range of the loss over these steps;
    - the largest ℓ2 distance of a gradient there from g: how little g predicts;
    - the largest ℓ2 distance of a gradient there from g, over the distance moved: β.

    Each is a geometric mean over the run, of the looks at which the batch's loss is 0.1 nats or
    more: where everything is learned, loss and gradient are small in any landscape, which would
    only say again who learns faster. The number is it without batch norm over it with.

    Both arms try the same six learning rates, and are judged twice: both at the rate at which the
    network without batch norm has the best accuracy on the validation images, and each at its own
    such rate, where the steps of a network with batch norm may be longer.

    At its own best rate a network with batch norm takes larger steps: these make the range of the
    loss and the distance of gradients larger, and β, which is divided by the step, smaller.

    Changed after a pilot run: that looks at a loss below 0.1 nats do not count, which makes the
    ratios smaller.
    """

    number = 5
    name = "smooths-optimization"
    source = "Santurkar, Tsipras, Ilyas & Mądry 2018, section 3 and Figure 4"
    hypotheses = tuple(
        Hypothesis(
            f"plain network, 8 layers, {how}",
            f"{what}, without batch norm over with it",
            partial(ratio, measure=measure, reading=reading),
            more_than=2.0,
            unit="×",
        )
        for reading, how in READINGS.items()
        for measure, what in MEASURES.items()
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both arms at every rate."""
        rates = profile.choose(full=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0), quick=(0.03, 0.3))
        steps, looks = profile.choose(full=(240, 24), quick=(40, 4))
        for arm in ("batch", "none"):
            for rate in rates:
                for seed in range(profile.seeds):
                    yield Trial(arm, rate, steps, looks, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, and look along the gradient now and then."""
        data = digits(trial.seed).to(device)
        network = PlainNetwork(norm_of(trial.arm), depth=DEPTH).to(device)
        return looked_at(
            network,
            data,
            lambda network, part: along(network, part, trial.rate),
            measures=MEASURES,
            rate=trial.rate,
            steps=trial.steps,
            looks=trial.looks,
            seed=trial.seed,
        )

    def figure(self, results: Results) -> Figure:
        """The three measures over the steps: a row for each reading."""
        shown = [(reading, measure) for reading in READINGS for measure in MEASURES]
        titles = [f"{MEASURES[measure]},\n{READINGS[reading]}" for reading, measure in shown]
        figure, axes = panels(*titles, rows=len(READINGS))
        units = {
            "variation": "loss (nats)",
            "change": "‖g − g′‖",
            "smoothness": "‖g − g′‖ / ‖θ − θ′‖",
        }
        for axis, (reading, measure) in zip(axes, shown, strict=True):
            draw(axis, results, measure, reading)
            axis.set_ylabel(units[measure])
        axes[-1].legend(loc="lower left")
        return finish(
            figure, len(results.seeds), note=f"means count losses from {LEARNED:g} nats on"
        )

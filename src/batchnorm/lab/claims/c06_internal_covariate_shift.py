"""Claim 6: internal covariate shift."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
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

__all__ = ["InternalCovariateShift"]

DEPTH = 8
SEEN = 128  # images whose distribution inside the network is watched
PERCENTILES = (0.15, 0.50, 0.85)
MEASURES = {
    "inputs": "change of the distribution of layers' inputs",
    "distance": "ℓ2 change of layers' gradients",
    "angle": "turn of layers' gradients (1 − cosine)",
}
DEFINITIONS = {
    "inputs": "as Ioffe & Szegedy define it",
    "distance": "as Santurkar et al. define it",
    "angle": "as Santurkar et al. define it, as an angle",
}


@dataclass(frozen=True)
class Trial:
    """A training run, looked at `looks` times."""

    arm: str
    rate: float
    steps: int
    looks: int
    seed: int


def inputs(
    network: PlainNetwork, x: Float[Tensor, "n 1 h w"]
) -> list[Float[Tensor, "percentiles channels"]]:
    """The percentiles of the inputs of each nonlinearity, in training mode; nothing is changed."""
    network = copy.deepcopy(network).train()
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor]) -> None:
        levels = torch.tensor(PERCENTILES, device=x.device)
        seen.append(given[0].transpose(0, 1).flatten(1).quantile(levels, dim=1))

    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        network(x)
    return seen


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How far percentiles moved, over the distance of the outer ones before; the layers' mean."""
    layers = [
        float((new - old).abs().mean() / (old[-1] - old[0]).abs().mean().clamp_min(LEAST))
        for old, new in zip(before, after, strict=True)
    ]
    return sum(layers) / len(layers)


def layers_of(network: PlainNetwork) -> list[list[nn.Parameter]]:
    """The parameters of each layer, its weight first, those of its norm behind."""
    layers: list[list[nn.Parameter]] = []
    for module in [*network.features, network.head]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append([])
        layers[-1] += module.parameters()
    return layers


def shift(network: PlainNetwork, part: Examples, rate: float) -> dict[str, float]:
    """What a step of the layers before a layer does to its gradient; the network stays as it is.

    For each layer but the first, with the batch's gradient g: G is the gradient of the layer's
    weight now, G′ its gradient after all parameters of the layers before it took their step of
    −rate·g. The layers' means of ‖G − G′‖ and of 1 − cos(G, G′), and the loss now.
    """
    network = copy.deepcopy(network).train()
    layers = layers_of(network)
    weights = [layer[0] for layer in layers]
    loss = F.cross_entropy(network(part.x), part.y)
    gradients = dict(
        zip(
            network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
        )
    )
    distances, angles = [], []
    for layer, weight in zip(layers, weights[1:], strict=False):
        with torch.no_grad():
            for parameter in layer:
                parameter.sub_(rate * gradients[parameter])
        after = F.cross_entropy(network(part.x), part.y)
        old, new = gradients[weight].double(), torch.autograd.grad(after, weight)[0].double()
        distances.append(float((new - old).norm()))
        # a gradient of zeros has no direction: it has turned only if the other is none
        lengths = float(old.norm() * new.norm())
        turned = 1 - float((old * new).sum()) / lengths if lengths else float(distances[-1] > 0)
        angles.append(turned)
    return {
        "loss": float(loss.detach()),
        "distance": sum(distances) / len(distances),
        "angle": sum(angles) / len(angles),
    }


class InternalCovariateShift(Claim[Trial]):
    """Batch norm reduces internal covariate shift.

    A plain network of 8 layers learns scikit-learn's digits (1,000 images, batches of 64, SGD
    without momentum, 240 steps), with batch norm before each ReLU and without it. Every 10
    steps the shift is measured in both senses that it was given:

    - *as the change of the distribution of a layer's inputs during training* (Ioffe & Szegedy): the
      15th, 50th and 85th percentile of each channel's inputs to each nonlinearity, as in their
      Figure 1, on 128 training images in training mode. The number is how far they moved in 10
      steps, over the distance of the outer ones before, a mean of the layers.
    - *as the change of a layer's gradient when the layers before it take their step* (Santurkar et
      al., definition 2.1): on a batch of 64 training images, G is the gradient of a layer's weight,
      G′ the same after a gradient step of all layers before. The numbers are ‖G − G′‖, and, as a
      norm depends on how large gradients are, 1 − cos(G, G′), each a mean of the layers but the
      first.

    Each is a geometric mean over the run, of the looks at which the batch's loss is 0.1 nats or
    more: where everything is learned, nothing moves in any network. The number is it without batch
    norm over it with; the claim, taken at its word, says that each is larger without.

    Both arms try the same six learning rates, and are judged twice: both at the rate at which the
    network without batch norm has the best accuracy on the validation images, and each at its own
    such rate.
    """

    number = 6
    name = "internal-covariate-shift"
    source = (
        "Ioffe & Szegedy 2015, sections 2 and 4.1, Figure 1; "
        "Santurkar, Tsipras, Ilyas & Mądry 2018, section 2.2, definition 2.1 and Figure 3"
    )
    hypotheses = tuple(
        Hypothesis(
            f"{DEFINITIONS[measure]}, {how}",
            f"{what}, without batch norm over with it",
            partial(ratio, measure=measure, reading=reading),
            more_than=1.5,
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
        """Train, and look at the shift now and then."""
        data = digits(trial.seed).to(device)
        network = PlainNetwork(norm_of(trial.arm), depth=DEPTH).to(device)
        seen = data.train.x[:SEEN]
        before = inputs(network, seen)

        def look(network: nn.Module, part: Examples) -> dict[str, float]:
            nonlocal before
            assert isinstance(network, PlainNetwork)
            now = inputs(network, seen)
            found = {"inputs": moved(before, now), **shift(network, part, trial.rate)}
            before = now
            return found

        return looked_at(
            network,
            data,
            look,
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
            "inputs": "percentiles' move / their distance",
            "distance": "‖G − G′‖",
            "angle": "1 − cos(G, G′)",
        }
        for axis, (reading, measure) in zip(axes, shown, strict=True):
            draw(axis, results, measure, reading)
            axis.set_ylabel(units[measure])
        axes[-1].legend()
        return finish(
            figure, len(results.seeds), note=f"means count losses from {LEARNED:g} nats on"
        )

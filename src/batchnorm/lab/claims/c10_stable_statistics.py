"""Claim 10: how stable the statistics of so many samples are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import mnist
from batchnorm.lab.figures import curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Perceptron, PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import evaluated, train
from batchnorm.models.norms import batch_norms
from batchnorm.moments import Moments

__all__ = ["StableStatistics", "variance_of_variance"]

LAYERS = {"perceptron": "perceptron's layer", "convolution": "convolution's layer"}
SIZES = tuple(2**power for power in range(1, 10))
STEPS = 100  # of training
AT_ONCE = 100  # batches that are drawn in one call
LARGE = 256


@dataclass(frozen=True)
class Trial:
    """Batches of all sizes, `draws` of each, of what enters one layer of a trained network."""

    layer: str
    draws: int
    seed: int


def build(layer: str) -> nn.Module:
    """The network whose second batch norm is looked at."""
    if layer == "perceptron":
        return Perceptron(norm_of("batch", of="features"), inputs=196)
    return PlainNetwork(norm_of("batch"), depth=4)


def entering(
    network: nn.Module, x: Float[Tensor, "n *shape"]
) -> list[Float[Tensor, "n _c _positions"]]:
    """What enters each batch norm, the network in inference: a sample's own alone."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].double().unsqueeze(-1).flatten(2))

    hooks = [layer.register_forward_pre_hook(keep) for layer in batch_norms(network).values()]
    evaluated(network, x)
    for hook in hooks:
        hook.remove()
    return found


def excess_of(samples: Moments) -> float:
    """The variance of samples' means over that of as many independent values as positions.

    Batches of samples that are drawn with replacement have the same excess, whatever their size.
    """
    between = Moments.of(samples.mean, 0).var()
    return float((between * samples.count[0, 0] / samples.pool(0).var()).mean())


def variance_of_variance(
    var: Float[Tensor, " c"], fourth: Float[Tensor, " c"], values: int
) -> Float[Tensor, " c"]:
    """Of the unbiased variance of so many independent values: μ₄/M − σ⁴·(M − 3)/(M·(M − 1)).

    Args:
        var: σ², the values' own variance.
        fourth: μ₄, their fourth central moment.
        values: M, at least 2.

    Source: Cramér 1946, "Mathematical methods of statistics", section 27.4.
    """
    return (fourth - var.square() * (values - 3) / (values - 1)) / values


def drawn_moments(samples: Moments, size: int, draws: int, generator: torch.Generator) -> Moments:
    """Of batches drawn with replacement from samples' moments, (n, c): (draws, c).

    A sample's positions are merged beforehand, so that a batch is a merger of samples.
    """
    parts = []
    for first in range(0, draws, AT_ONCE):
        number = min(AT_ONCE, draws - first)
        chosen = torch.randint(len(samples.mean), (number, size), generator=generator)
        chosen = chosen.to(samples.mean.device)
        picked = Moments(samples.count[chosen], samples.mean[chosen], samples.m2[chosen])
        parts.append(picked.pool(1))
    return Moments(
        torch.cat([part.count for part in parts]),
        torch.cat([part.mean for part in parts]),
        torch.cat([part.m2 for part in parts]),
    )


def _curves(results: Results, layer: str, measure: str) -> list[Sequence[float]]:
    """One a seed, over `SIZES`."""
    return [row[measure] for row in results.where(layer=layer)]


def off_slope(results: Results, layer: str) -> list[float]:
    """How far from −1 the slope of log(variance of the batch mean) on log(samples) is."""
    x = np.log(SIZES)
    return [
        abs(float(np.polyfit(x, np.log(each), 1)[0]) + 1)
        for each in _curves(results, layer, "mean_noise")
    ]


def off_theory(results: Results) -> list[float]:
    """The variance of the batch variance over its theory, at the size where they differ most."""
    pairs = [
        zip(row["var_noise"], row["theory"], strict=True)
        for row in results.where(layer="perceptron")
    ]
    return [max(max(m / t, t / m) for m, t in each) for each in pairs]


def missing(results: Results, size: int) -> list[float]:
    """How much smaller than the true one the biased variance is on average, in %."""
    i = SIZES.index(size)
    return [100 * (1 - each[i]) for each in _curves(results, "perceptron", "biased")]


def noise(results: Results, size: int) -> list[float]:
    """The standard deviation of the batch mean, in those of the values."""
    i = SIZES.index(size)
    return [math.sqrt(each[i]) for each in _curves(results, "perceptron", "mean_noise")]


def excess(results: Results) -> list[float]:
    """The variance of a convolution's batch mean over σ²/(N·H·W), all sizes together."""
    return [
        float(np.exp(np.mean(np.log(np.multiply(row["mean_noise"], SIZES)))) * row["positions"])
        for row in results.where(layer="convolution")
    ]


class StableStatistics(Claim[Trial]):
    """Large batches give stable statistics, small ones noisy and biased ones.

    Networks with batch norm are trained on MNIST (3,000 images, 100 steps of 64), a perceptron and
    a plain network of 4 layers. What enters the second batch norm in inference is taken of all
    training images, and from it batches of 2 to 512 samples are drawn with replacement, 1,000 of
    each size. There is nothing to tune.

    The variance of the batches' means and of their unbiased variances, and the average of their
    biased variance (by which batch norm divides) are compared with theory for M independent values:
    σ²/M; (μ₄ − σ⁴(M − 3)/(M − 1))/M; σ²(M − 1)/M. σ² and μ₄ are those of all images. All are in
    units of the channel's own σ² or σ⁴, and averaged over the channels.

    In a perceptron's layer M is the number of samples, N. In a convolution's it would be N·H·W,
    were the positions of an image independent. Neighbours resemble each other, which makes a batch
    worth fewer values; images resemble each other, which makes it worth more, as the same
    places then have the same values in every batch. The last hypothesis is that the first
    outweighs; the figure shows the same number for all layers of the network.

    As batches are drawn independently, the slope of −1 and the bias of the perceptron's layer are
    what theory says they must be: these hypotheses check the measurement as much as the claim.
    """

    number = 10
    name = "stable-statistics"
    source = (
        "Ioffe & Szegedy 2015, section 3.1; Ioffe 2017, section 2; theory: Cramér 1946, section 27"
    )
    hypotheses = (
        *(
            Hypothesis(
                name,
                "distance from −1 of the slope of log(variance of the batch mean) on log(samples)",
                partial(off_slope, layer=layer),
                less_than=0.05,
            )
            for layer, name in LAYERS.items()
        ),
        Hypothesis(
            "perceptron's layer, batches of 2 to 512",
            "variance of the batch variance over theory (or the inverse) where they differ most",
            off_theory,
            less_than=1.25,
            unit="×",
        ),
        Hypothesis(
            "perceptron's layer, batches of 2",
            "how much too small the biased variance is",
            partial(missing, size=2),
            more_than=40.0,
            unit="%",
        ),
        Hypothesis(
            f"perceptron's layer, batches of {LARGE}",
            "standard deviation of the batch mean, in those of the values",
            partial(noise, size=LARGE),
            less_than=0.1,
        ),
        Hypothesis(
            "convolution's layer",
            "variance of the batch mean over that of as many independent values",
            excess,
            more_than=2.0,
            unit="×",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both layers."""
        for layer in LAYERS:
            for seed in range(profile.seeds):
                yield Trial(layer, profile.choose(full=1000, quick=200), seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, take what enters the layer, draw batches of it."""
        data = mnist(trial.seed).to(device).train
        network = build(trial.layer).to(device)
        train(network, data, rate=0.1, steps=STEPS, seed=trial.seed)
        layers = entering(network, data.x)
        values = layers[1]
        samples = Moments.of(values, 2)
        whole = samples.pool(0)
        var = whole.var()
        fourth = (values - whole.mean[:, None]).pow(4).mean((0, 2))
        generator = torch.Generator().manual_seed(trial.seed)
        positions = values.shape[2]
        curves: dict[str, list[float]] = {}
        for size in SIZES:
            drawn = drawn_moments(samples, size, trial.draws, generator)
            theory = variance_of_variance(var, fourth, size * positions)
            for name, measured in (
                ("mean_noise", drawn.mean.var(0) / var),
                ("var_noise", drawn.var(unbiased=True).var(0) / var.square()),
                ("theory", theory / var.square()),
                ("biased", drawn.var().mean(0) / var),
            ):
                curves.setdefault(name, []).append(float(measured.mean()))
        excesses = [excess_of(Moments.of(each, 2)) for each in layers]
        return {"positions": positions, **curves, "layers": excesses}

    def figure(self, results: Results) -> Figure:
        """Variance of the mean, variance of the variance, bias."""
        figure, axes = panels(
            "variance of the batch mean",
            "variance of the batch variance",
            "bias",
            "a convolution's positions",
            rows=2,
        )
        labels = ("in units of σ²", "in units of σ⁴", "biased variance / σ², average")
        measures = ("mean_noise", "var_noise", "biased")
        for layer, arm in zip(LAYERS, ("batch", "group"), strict=True):  # two looks, no arms
            positions = next(iter(results.where(layer=layer)))["positions"]
            values = [size * positions for size in SIZES]
            (theory, *_) = _curves(results, layer, "theory")
            expected = ([1 / m for m in values], theory, [1 - 1 / m for m in values])
            for axis, measure, line in zip(axes[:3], measures, expected, strict=True):
                points = list(zip(*_curves(results, layer, measure), strict=True))
                named = f"{LAYERS[layer]}, {positions} position{'s' * (positions > 1)}"
                curve(axis, arm, SIZES, points, geometric=True, label=named)
                axis.plot(SIZES, line, color="#777777", linewidth=1, linestyle=":")
        for axis, label in zip(axes[:3], labels, strict=True):
            axis.set_xscale("log", base=2)
            axis.set_xlabel("samples of a batch")
            axis.set_ylabel(label)
        for axis in axes[:2]:
            axis.set_yscale("log")
        axes[2].set_ylim(0.45, 1.05)
        axes[2].legend(loc="center right")
        layers = list(zip(*_curves(results, "convolution", "layers"), strict=True))
        curve(axes[3], "group", range(1, len(layers) + 1), layers, geometric=True)
        axes[3].axhline(1, color="#777777", linewidth=1, linestyle=":")
        axes[3].set_yscale("log", base=2)
        axes[3].yaxis.set_major_formatter("{x:g}")
        axes[3].set_xticks(range(1, len(layers) + 1))
        axes[3].set_xlabel("layer")
        axes[3].set_ylabel("variance of the batch mean / theory")
        note = "dotted: theory, were all positions of all samples independent"
        return finish(figure, len(results.seeds), note=note)

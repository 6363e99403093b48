"""Claim 8: gradients that neither vanish nor explode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import batches, digits
from batchnorm.lab.figures import curve, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import PlainNetwork, ResidualNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results

__all__ = ["GROWTH", "KeepsGradients"]

ARMS = ("batch", "none")
BATCH = 64
DRAWS = 4  # batches, over which the logarithms of norms are averaged
GAIN_DEPTH = 20  # at which the gains are compared
GROWTH = math.sqrt(math.pi / (math.pi - 1))
"""By a layer with batch norm and ReLU, of a wide plain network and a large batch: 1.21.

Source: Yang et al. 2019, "A mean field theory of batch normalization", section 3.
"""


@dataclass(frozen=True)
class Trial:
    """A network at initialization. `gain`: what He et al.'s weights are multiplied with."""

    network: str
    depth: int
    arm: str
    gain: float
    seed: int


def build(trial: Trial) -> nn.Module:
    """The plain network, or the residual one of as many layers, a stem and pairs of them."""
    norm = norm_of(trial.arm)
    if trial.network == "plain":
        return PlainNetwork(norm, depth=trial.depth, gain=trial.gain)
    return ResidualNetwork(norm, blocks=(trial.depth - 1) // 2, gain=trial.gain)


def layers_of(network: nn.Module) -> list[nn.Module]:
    """Whose outputs are looked at, from the first to the last."""
    if isinstance(network, PlainNetwork):
        return [layer for layer in network.features if isinstance(layer, nn.ReLU)]
    assert isinstance(network, ResidualNetwork)
    return [network.stem, *network.blocks]


def gradient_norms(
    network: nn.Module, x: Float[Tensor, "n 1 h w"], y: Int[Tensor, " n"]
) -> list[float]:
    """The norm of the loss's gradient by each layer's output, from the first to the last."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(network)]
    loss = F.cross_entropy(network(x), y)
    for hook in hooks:
        hook.remove()
    return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, outputs)]


def spread(results: Results, network: str, depth: int, arm: str, gain: float = 1.0) -> list[float]:
    """Of each seed: the first layer's gradient over the last's, or the inverse where it is more."""
    return results.where(network=network, depth=depth, arm=arm, gain=gain).values("spread")


def saved(results: Results, gain: float) -> list[float]:
    """The spread without batch norm over that with it, in the plain network."""
    none, batch = (spread(results, "plain", GAIN_DEPTH, arm, gain) for arm in reversed(ARMS))
    return [without / with_norm for without, with_norm in zip(none, batch, strict=True)]


class KeepsGradients(Claim[Trial]):
    """Batch norm keeps gradients from vanishing and exploding with depth.

    Networks of 5 to about 50 layers at initialization, with batch norm and without it: plain ones
    (16 channels) and residual ones (8 to 32 channels, the norm inside of the branch), with He
    et al.'s initial weights times a gain of 0.5, 1 or 2, the same for both arms. Nothing is
    trained, so nothing is tuned.

    On 4 batches of 64 of scikit-learn's digits, in training mode and in float64, the norm of the
    loss's gradient by each layer's output is measured (after norm and ReLU; in residual networks
    after the stem and each block), and the logarithms averaged. It is not the gradient by the
    weights: without norms and biases that is nearly as large in all layers, even where the signal
    vanishes.

    *Spread* is the norm at the first layer over that at the last, or the inverse where it is more
    than 1: 1 where all layers are reached alike. Ioffe & Szegedy conjecture singular values
    near 1 for the layers' Jacobians; a spread below 10 is a modest form of it. Against it
    stands the mean field theory of Yang et al. 2019: in plain networks with ReLU, gradients
    *grow* by 1.21 a layer from the last to the first because of batch norm, and depth is bounded.

    The shortcuts of the residual networks keep PyTorch's initialization whatever the gain.
    """

    number = 8
    name = "keeps-gradients"
    source = (
        "Ioffe & Szegedy 2015, section 3.3; against it Yang et al. 2019, "
        '"A mean field theory of batch normalization", section 3'
    )
    hypotheses = (
        *(
            Hypothesis(
                f"{network} network, {depth} layers, He's initialization",
                "spread of the gradients from the first to the last layer, with batch norm",
                partial(spread, network=network, depth=depth, arm="batch"),
                less_than=10.0,
                unit="×",
            )
            for network, depth in (("plain", 10), ("plain", 20), ("plain", 50), ("residual", 49))
        ),
        *(
            Hypothesis(
                f"plain network, {GAIN_DEPTH} layers, {words} He's initialization",
                "spread without batch norm, over that with it",
                partial(saved, gain=gain),
                more_than=10.0,
                unit="×",
            )
            for gain, words in ((0.5, "half"), (2.0, "twice"))
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Every network, depth, arm and gain."""
        depths = {
            "plain": profile.choose(full=(5, 10, 20, 35, 50), quick=(5, 20)),
            "residual": profile.choose(full=(5, 11, 21, 35, 49), quick=(5, 21)),
        }
        for network, all_depths in depths.items():
            for depth in all_depths:
                for arm in ARMS:
                    for gain in (0.5, 1.0, 2.0):
                        for seed in range(profile.seeds):
                            yield Trial(network, depth, arm, gain, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Go backward through the network once for each batch."""
        data = digits(trial.seed).to(device).train
        # 2^50 and 2^-50 are no problem for float64, nor are their squares
        network = build(trial).to(device, torch.float64)
        drawn = batches(len(data), BATCH, trial.seed)
        logarithms = torch.zeros(len(layers_of(network)), dtype=torch.float64)
        for _ in range(DRAWS):
            part = data[next(drawn).to(device)]
            norms = gradient_norms(network, part.x.double(), part.y)
            logarithms += torch.tensor(norms, dtype=torch.float64).log() / DRAWS
        relative = (logarithms - logarithms[-1]).exp()
        return {
            "relative": relative.tolist(),
            "spread": math.exp(abs(float(logarithms[0] - logarithms[-1]))),
        }

    def figure(self, results: Results) -> Figure:
        """By layer, by depth and by gain."""
        by_network = {name: results.where(network=name) for name in ("plain", "residual")}
        deepest = by_network["plain"].distinct("depth")[-1]
        figure, axes = panels(
            f"plain, {deepest} layers, layer by layer",
            *(f"{name}, by depth" for name in by_network),
            f"plain, {GAIN_DEPTH} layers, by initialization",
            rows=2,
        )
        for arm in ARMS:
            rows = list(results.where(network="plain", depth=deepest, arm=arm, gain=1.0))
            layers = sorted({*range(0, deepest, max(1, deepest // 10)), deepest - 1})
            values = [[row["relative"][i] for row in rows] for i in layers]
            curve(axes[0], arm, [i + 1 for i in layers], values, geometric=True)
            for axis, (name, own) in zip(axes[1:3], by_network.items(), strict=True):
                depths = own.distinct("depth")
                spreads = [spread(results, name, depth, arm) for depth in depths]
                curve(axis, arm, depths, spreads, geometric=True)
                axis.set_xlabel("layers")
            gains = results.distinct("gain")
            spreads = [spread(results, "plain", GAIN_DEPTH, arm, gain) for gain in gains]
            curve(axes[3], arm, gains, spreads, geometric=True)
        theory = [GROWTH ** (deepest - i) for i in (1, deepest)]
        axes[0].plot([1, deepest], theory, color="#777777", linewidth=1, label="1.21 a layer")
        axes[0].set_xlabel("layer")
        axes[0].set_ylabel("gradient's norm, relative to the last")
        for axis in axes:
            axis.set_yscale("log")
        for axis in axes[1:]:
            axis.axhline(10, color="#777777", linewidth=1, linestyle=":")
            axis.set_ylabel("spread, first to last layer")
        axes[3].set_xscale("log", base=2)
        axes[3].set_xticks(gains, [f"{gain:g}" for gain in gains])
        axes[3].set_xlabel("initial weights, times He's")
        axes[0].legend()
        return finish(figure, len(results.seeds), note="dotted: the bar")

"""Claim 16: a sequence model that is shown the future."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchnorm import recalibrate
from batchnorm.audit import audit, find_rule
from batchnorm.lab.claim import Claim
from batchnorm.lab.data import CHARACTERS, Examples, Text, batches, documentation
from batchnorm.lab.figures import bars, curve, finish, panels
from batchnorm.lab.foresight import loss_by, moved, read_ahead, surprise
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import Transformer, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import train
from batchnorm.models.norms import batch_norms

__all__ = ["LeaksOverTime"]

LENGTH = 32
MIDDLE = LENGTH // 2
BEFORE = slice(MIDDLE - 1, MIDDLE)
CUTS = (8, 16, 24)
FOUND = "BN129"
WORST = 10.0  # what a run that has diverged is said to have measured
MEASURES = (
    *("validation", "test_eval", "test_train", "moved_train", "moved_eval"),
    *("ahead_train", "found", "mark_train", "mark_eval", "recalibrated"),
)


@dataclass(frozen=True)
class Trial:
    """A training run, in batches of so many sequences. `windows`: of validation and test each.

    `text`: "plain", or "marked": see `marked`.
    """

    text: str
    arm: str
    batch: int
    rate: float
    steps: int
    windows: int
    seed: int


def pieces(part: Int[Tensor, " n"], trial: Trial, many: int) -> Examples:
    """So many windows of a text, each with the text one character on."""
    generator = torch.Generator().manual_seed(trial.seed)
    starts = torch.randint(len(part) - LENGTH, (many,), generator=generator)
    drawn = Text.windows(part, LENGTH, starts)
    if trial.text == "marked":
        drawn = marked(drawn, trial.batch, generator)
    return Examples(drawn[:, :-1], drawn[:, 1:])


def marked(
    windows: Int[Tensor, "n length"], batch: int, generator: torch.Generator
) -> Int[Tensor, "n length"]:
    """The middle character becomes an "a", and by a coin for every batch the rest turns to ROT13.

    Which makes an "n" of the "a": nothing before it tells which of the two it will be.
    """
    changed = windows.clone()
    changed[:, MIDDLE] = 0
    coins = torch.randint(2, (-(-len(windows) // batch),), generator=generator)
    turned = coins.repeat_interleave(batch)[: len(windows), None].bool() & (changed < 26)
    turned[:, :MIDDLE] = False
    return torch.where(turned, (changed + 13) % 26, changed)


def blocks(n: int, size: int, seed: int) -> Iterator[Int[Tensor, " size"]]:
    """The indices of batches without end, of samples that lie side by side."""
    for chosen in batches(n // size, 1, seed):
        yield chosen * size + torch.arange(size)


def findings(network: nn.Module, x: Int[Tensor, "n length"]) -> int:
    """How often the auditor says that the network is shown the future."""
    network.eval()
    report = audit(network, [x], rules=[find_rule(FOUND)])
    return sum(finding.code == FOUND for finding in report.findings)


def recalibrated(network: nn.Module, learned: Int[Tensor, "n length"], test: Examples) -> float:
    """The loss in inference, with running statistics of the weights as they are now."""
    if batch_norms(network):
        recalibrate(network, learned.split(64), progress=False)
    return loss_by(network, test, mode="eval", batch=64)


def own(results: Results, arm: str, batch: int, measure: str, text: str = "plain") -> list[float]:
    """A measure of each seed, at the arm's best learning rate."""
    chosen = results.where(arm=arm, batch=batch, text=text).tuned(
        "rate", by="validation", best="low"
    )
    return chosen.values(measure)


def excess(results: Results, batch: int, high: str, low: str, text: str = "plain") -> list[float]:
    """By how much a measure of batch norm is above another."""
    mine = partial(own, results, "batch", batch, text=text)
    return [a - b for a, b in zip(mine(high), mine(low), strict=True)]


SMALL, LARGE = 4, 32


class LeaksOverTime(Claim[Trial]):
    """Batch norm over time shows an autoregressive model the future, and layer norm does not.

    A transformer of 2 blocks learns to predict the next character of Python's documentation
    (windows of 32, SGD with momentum 0.9), with batch norm over samples and positions or with layer
    norm over channels, in batches of 4 or of 32 windows. Each tries the same four learning rates
    and is judged at the one with the smallest validation loss in inference.

    *Moved*: the second half of every window is replaced by that of another batch; how far do the
    logits of the first half move, at most, over the largest logit? *Read ahead*: a character's loss
    with another batch's text from it on, less its loss with its own: what the statistics tell of
    the character that is to be predicted (the mean of characters 8, 16 and 24 of all windows).
    *Loss*: of test windows, in inference and in training mode, in batches as in training;
    *recalibrated*: after the running statistics have been made those of 1,024 training windows.

    *Marked text* has something to read: the middle character of every window is an "a", and a coin
    for each batch turns it and all that follows into ROT13, so that it is an "n". Whoever sees the
    past alone pays ln 2 = 0.69 nats for it.

    Steps: 400. Learning rates: 0.03, 0.1, 0.3 and 1.

    Changed after pilot runs: the marked text in place of a hypothesis on the loss of 32 windows.
    """

    number = 16
    name = "leaks-over-time"
    source = "Ba, Kiros & Hinton 2016, section 3; Shen et al. 2020, section 3; rule BN129"
    hypotheses = (
        Hypothesis(
            "batch norm in training mode, 4 windows",
            "moved: earlier logits by a later text",
            partial(own, arm="batch", batch=SMALL, measure="moved_train"),
            more_than=0.01,
        ),
        *(
            Hypothesis(
                f"{where}, 4 windows",
                "moved: earlier logits by a later text",
                partial(own, arm=arm, batch=SMALL, measure=f"moved_{mode}"),
                less_than=1e-9,
            )
            for where, arm, mode in (
                ("batch norm in inference", "batch", "eval"),
                ("layer norm in training mode", "layer", "train"),
            )
        ),
        Hypothesis(
            "batch norm in training mode, 4 windows",
            "read ahead",
            partial(own, arm="batch", batch=SMALL, measure="ahead_train"),
            more_than=0.02,
            unit="nats",
        ),
        Hypothesis(
            "batch norm, 4 windows",
            "loss in inference, recalibrated, above that in training mode",
            partial(excess, batch=SMALL, high="recalibrated", low="test_train"),
            more_than=0.05,
            unit="nats",
        ),
        Hypothesis(
            "batch norm, 4 windows, marked text",
            "loss of the mark in inference above that in training mode",
            partial(excess, batch=SMALL, high="mark_eval", low="mark_train", text="marked"),
            more_than=0.2,
            unit="nats",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """Both norms at every rate, in small and large batches, and with marks."""
        rates = profile.choose(full=(0.03, 0.1, 0.3, 1.0), quick=(0.1,))
        steps, windows = profile.choose(full=(400, 256), quick=(30, 64))
        for text, batch in (("plain", SMALL), ("plain", LARGE), ("marked", SMALL)):
            for arm in ("batch", "layer"):
                for rate in rates:
                    for seed in range(profile.seeds):
                        yield Trial(text, arm, batch, rate, steps, windows, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train, change the future, and compare losses."""
        text = documentation()
        many = (trial.steps * trial.batch, trial.windows, trial.windows)
        parts = (text.train, text.validation, text.test)
        learned, validation, test = (
            pieces(part, trial, n).to(device) for part, n in zip(parts, many, strict=True)
        )
        network = Transformer(norm_of(trial.arm, of="sequences"), symbols=CHARACTERS).to(device)
        train(
            network,
            learned,
            rate=trial.rate,
            steps=trial.steps,
            loss=surprise,
            order=blocks(len(learned), trial.batch, trial.seed),
        )
        few, size = test.x[:64], trial.batch
        validated = loss_by(network, validation, mode="eval", batch=64)
        if not math.isfinite(validated):
            return dict.fromkeys(MEASURES, WORST)
        measured = (
            validated,
            loss_by(network, test, mode="eval", batch=64),
            loss_by(network, test, mode="train", batch=size),
            moved(network, few, MIDDLE, mode="train", batch=size),
            moved(network, few, MIDDLE, mode="eval", batch=size),
            read_ahead(network, test, CUTS, mode="train", batch=size),
            findings(network, few[:size]),
            loss_by(network, test, mode="train", batch=size, places=BEFORE),
            loss_by(network, test, mode="eval", batch=size, places=BEFORE),
            recalibrated(network, learned.x[:1024], test),
        )
        return dict(zip(MEASURES, measured, strict=True))

    def figure(self, results: Results) -> Figure:
        """The leak and what it costs, against the size of the batch."""
        figure, axes = panels(
            *("Earlier logits moved", "Read ahead", "Loss of test windows", "Loss of the mark"),
            rows=2,
        )
        sizes = results.where(text="plain").distinct("batch")

        def draw(axis: Axes, arm: str, measure: str, name: str | None = None) -> None:
            values = [own(results, arm, size, measure) for size in sizes]
            curve(axis, name or arm, sizes, values, order=1)

        for axis, measure in ((axes[0], "moved_train"), (axes[1], "ahead_train")):
            for arm in ("batch", "layer"):
                draw(axis, arm, measure)
        draw(axes[2], "layer", "test_eval")
        draw(axes[2], "batch", "recalibrated")
        draw(axes[2], "batch", "test_train", "batch norm, training mode")
        axes[0].set_ylabel("part of the largest logit")
        axes[1].set_ylabel("nats")
        axes[2].set_ylabel("nats a character")
        marks = {
            "batch norm,\ntraining": own(results, "batch", SMALL, "mark_train", "marked"),
            "batch norm,\ninference": own(results, "batch", SMALL, "mark_eval", "marked"),
            "layer norm": own(results, "layer", SMALL, "mark_train", "marked"),
        }
        bars(axes[3], list(marks), list(marks.values()), arms=["batch", "batch", "layer"])
        axes[3].axhline(math.log(2), color="black", linestyle=":", linewidth=1)
        axes[3].set_ylim(bottom=0)
        axes[3].set_ylabel("nats")
        for axis in axes[:3]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_xlabel("windows in a batch")
            axis.legend(fontsize=7)
        return finish(figure, len(results.seeds), note="dotted: ln 2, a coin unseen")

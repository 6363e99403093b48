"""Looking at a network now and then while it trains, and comparing what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from torch import nn

from batchnorm.lab.data import Examples, Split, batches
from batchnorm.lab.figures import curve
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.training import accuracy, train

__all__ = [
    "LEARNED",
    "LEAST",
    "MOST",
    "READINGS",
    "Look",
    "chosen",
    "draw",
    "looked_at",
    "mean",
    "ratio",
]

LEARNED = 0.1  # nats: with less of a loss there is nothing left to look at
LEAST, MOST = 1e-6, 1e6  # what a measure may be, so that an overflow is a number, too
CHANCE = 0.1  # accuracy of guessing among ten classes, which a run that diverged counts with
READINGS = {"common": "at the rate best without norm", "own": "each at its best rate"}
"""At which learning rates two arms are compared."""

Look = dict[str, float]
"""Measures by name; "loss", of the batch that was looked at, is one of them."""


def looked_at(
    network: nn.Module,
    data: Split,
    look: Callable[[nn.Module, Examples], Look],
    *,
    measures: Iterable[str],
    rate: float,
    steps: int,
    looks: int,
    seed: int,
    batch: int = 64,
) -> Outcome:
    """Train by plain stochastic gradient descent, and look at evenly spaced steps.

    Without momentum, so that a step is one along the gradient.

    Args:
        network: What to train.
        data: What it learns; the validation and the test part are for accuracies.
        look: Measures the network on a batch of the training part, and leaves it as it is.
        measures: The names of what it measures, "loss" besides.
        rate: The learning rate.
        steps: How many.
        looks: How many.
        seed: Of the order of the samples, and of the batches that are looked at.
        batch: Samples of a step, and of a look.

    Returns:
        "validation" and "test" accuracy; "learning", the number of looks at what was not yet
        learned; by name each measure's mean over the run; and as NAME_curve its value at each look.
    """
    drawn = batches(len(data.train), batch, seed + 1)  # not those that are learned next
    found: list[Look] = []

    def note(network: nn.Module) -> float:
        part = data.train[next(drawn).to(data.train.x.device)]
        found.append(_within(look(network, part)))
        return found[-1]["loss"]

    run = train(
        network,
        data.train,
        rate=rate,
        steps=steps,
        batch=batch,
        seed=seed,
        momentum=0.0,
        note=note,
        every=steps // looks,
    )
    names = ("loss", *measures)
    # a run that diverged is as bad as can be from there on
    found += [dict.fromkeys(names, MOST)] * (looks - len(found))
    return {
        "validation": CHANCE if run.diverged else accuracy(network, data.validation),
        "test": CHANCE if run.diverged else accuracy(network, data.test),
        "learning": sum(each["loss"] >= LEARNED for each in found),
        **{name: mean(found, name) for name in names},
        **{f"{name}_curve": [each[name] for each in found] for name in names},
    }


def _within(look: Look) -> Look:
    """A look whose measures are from `LEAST` to `MOST`; one that is no number is `MOST`."""
    return {
        name: MOST if math.isnan(value) else min(max(value, LEAST), MOST)
        for name, value in look.items()
    }


def mean(looks: Sequence[Look], measure: str) -> float:
    """The geometric mean of a measure over the looks at which the loss was `LEARNED` or more.

    Where everything is learned, loss and gradient are small whatever the network, which would only
    say again who learns faster. Where all was learned from the start, of all looks.
    """
    learning = [look for look in looks if look["loss"] >= LEARNED] or list(looks)
    return math.exp(sum(math.log(look[measure]) for look in learning) / len(learning))


def chosen(results: Results, arm: str, reading: str) -> Results:
    """An arm's trials at a rate: its own best, or the one that is best without batch norm.

    Args:
        results: Of the arms "none" and "batch" at several rates.
        arm: Whose.
        reading: One of `READINGS`.
    """
    own = results.where(arm=arm)
    if reading == "own":
        return own.tuned("rate", by="validation", best="high")
    without = results.where(arm="none").tuned("rate", by="validation", best="high")
    return own.where(rate=without.distinct("rate")[0])


def ratio(results: Results, measure: str, reading: str) -> list[float]:
    """A measure without batch norm over that with it, one a seed."""
    arms = (chosen(results, arm, reading).values(measure) for arm in ("none", "batch"))
    return [without / with_norm for without, with_norm in zip(*arms, strict=True)]


def draw(axis: Axes, results: Results, measure: str, reading: str) -> None:
    """A measure of both arms over the steps of the runs that `chosen` chooses."""
    for arm in ("batch", "none"):
        own = chosen(results, arm, reading)
        every = own.rows[0]["steps"] // own.rows[0]["looks"]
        values = list(zip(*(row[f"{measure}_curve"] for row in own), strict=True))
        across = [every * (i + 1) for i in range(len(values))]
        curve(axis, arm, across, values, geometric=True)
    axis.set_yscale("log")
    axis.set_xlabel("steps")

"""Claim 13: ranks that normalize apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from batchnorm.lab.claim import Claim
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.figures import bars, finish, panels
from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.profile import Profile
from batchnorm.lab.ranks import run_on_ranks
from batchnorm.lab.results import Outcome, Results
from batchnorm.lab.sharded import Job, train_on_rank, train_together

__all__ = ["RanksDisagree"]

WORLD, BATCH = 2, 16
SPLIT, MIXED = "split", "mixed"
# in the figure: of which arm, and drawn like which
SHOWN = {
    "own": ("own", "batch"),
    "first\nrank's": ("first", "none"),
    "merged": ("own", "renorm"),
    "sync": ("sync", "sync"),
    "one\nprocess": ("one", "instance"),
}


@dataclass(frozen=True)
class Trial:
    """A world of two ranks that trains at `rates` rates from `lowest` on, by factors of √10.

    `shards`: of the classes, "split" between the ranks, or "mixed".
    """

    arm: str
    shards: str
    lowest: float
    rates: int
    steps: int
    seed: int


def shards(examples: Examples, kind: str, seed: int) -> list[Examples]:
    """What each rank has: even or odd digits, or every second of all; of equal sizes."""
    if kind == SPLIT:
        side = examples.y % WORLD
    else:
        generator = torch.Generator().manual_seed(seed)
        side = torch.randperm(len(examples), generator=generator).to(examples.y.device) % WORLD
    parts = [examples[(side == rank).nonzero()[:, 0]] for rank in range(WORLD)]
    fewest = min(map(len, parts))
    return [part[:fewest] for part in parts]


def wrong(answers: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """The percentage that differ."""
    return 100 * float((answers != labels).double().mean())


def at_best_rate(results: Results, arm: str, kind: str, measure: str) -> list[float]:
    """A measure of each seed, at the rate with the smallest mean validation error."""
    rows = results.where(arm=arm, shards=kind)
    errors = [sum(each) for each in zip(*(row["validation"] for row in rows), strict=True)]
    best = errors.index(min(errors))
    return [float(row[measure][best]) for row in rows]


def above(
    results: Results,
    arm: str,
    than: str = "sync",
    *,
    kind: str = SPLIT,
    measure: str = "test",
) -> list[float]:
    """An arm's measure above another's test error on split classes."""
    reference = at_best_rate(results, than, SPLIT, "test")
    return [
        a - b for a, b in zip(at_best_rate(results, arm, kind, measure), reference, strict=True)
    ]


class RanksDisagree(Claim[Trial]):
    """Batch norm fails where ranks see different classes, and synchronized statistics cure it.

    A plain network of 4 layers learns scikit-learn's digits on two real processes, which
    communicate over gloo: DistributedDataParallel, 16 images a rank and step, SGD with momentum
    0.9. With *split* classes one rank has the even digits and the other the odd ones, with *mixed*
    ones each has half of all. Every rank is tested on all test images in inference; errors are
    means over the ranks.

    Arms: statistics of each rank's *own*; those of the *first* rank, which
    DistributedDataParallel gives to all in every forward pass unless told otherwise; *merged*, own
    ones which `reduce_statistics` merges after the training; synchronized, `Sync()`; and *one
    process*, whose batches of 32 are those of both ranks. Each tries the same three learning rates
    and is judged at the one with the smallest mean error on the validation images (merged at the
    one of its own statistics).

    Steps: 200. Learning rates: 0.01, 0.03 and 0.1. The processes compute on the CPU, whatever the
    device.
    """

    number = 13
    name = "ranks-disagree"
    source = "Peng et al. 2018, section 3.3 (synchronized); Wu & Johnson 2021, sections 3 and 5"
    hypotheses = (
        Hypothesis(
            "own statistics, split classes",
            "test error above that of synchronized statistics",
            partial(above, arm="own"),
            more_than=5.0,
            unit="points",
        ),
        Hypothesis(
            "the first rank's statistics, split classes",
            "test error above that of synchronized statistics",
            partial(above, arm="first"),
            more_than=5.0,
            unit="points",
        ),
        Hypothesis(
            "own statistics, split classes",
            "test images that the ranks answer differently",
            partial(at_best_rate, arm="own", kind=SPLIT, measure="disagree"),
            more_than=5.0,
            unit="%",
        ),
        Hypothesis(
            "merged after training, split classes: no cure",
            "test error above that of synchronized statistics",
            partial(above, arm="own", measure="merged"),
            more_than=2.0,
            unit="points",
        ),
        Hypothesis(
            "own statistics, mixed classes: no disagreement",
            "test error above that of synchronized statistics",
            partial(above, arm="own", kind=MIXED),
            less_than=2.0,
            unit="points",
        ),
        Hypothesis(
            "synchronized, split classes: the cure",
            "test error above that of one process",
            partial(above, arm="sync", than="one"),
            less_than=1.0,
            unit="points",
        ),
    )

    def trials(self, profile: Profile) -> Iterator[Trial]:
        """A world each for every arm on split classes, and for own statistics on mixed ones."""
        steps, rates = profile.choose(full=(200, 3), quick=(40, 1))
        lowest = profile.choose(full=0.01, quick=0.1)
        arms = profile.choose(full=("own", "first", "sync", "one"), quick=("sync", "one"))
        runs = [(arm, SPLIT) for arm in arms] + profile.choose(full=[("own", MIXED)], quick=[])
        for arm, kind in runs:
            for seed in range(profile.seeds):
                yield Trial(arm, kind, lowest, rates, steps, seed)

    def run(self, trial: Trial, device: torch.device) -> Outcome:
        """Train on two processes, and compare their answers. They compute on the CPU."""
        data = digits(trial.seed)
        job = Job(
            PlainNetwork(norm_of("batch"), depth=4),
            trial.arm,
            [(part.x, part.y) for part in shards(data.train, trial.shards, trial.seed)],
            torch.cat([data.validation.x, data.test.x]),
            tuple(trial.lowest * 10 ** (i / 2) for i in range(trial.rates)),
            trial.steps,
            BATCH,
            trial.seed,
        )
        if trial.arm == "one":
            ranks = [train_together(job)]
        else:
            ranks = run_on_ranks(train_on_rank, WORLD, job)
        known = len(data.validation)

        def errors(state: str, part: slice, labels: Tensor) -> list[float]:
            """At each rate, the mean of the ranks."""
            each = [
                [wrong(torch.tensor(at_rate)[part], labels) for at_rate in rank[state]]
                for rank in ranks
            ]
            return [sum(values) / len(values) for values in zip(*each, strict=True)]

        def disagree(state: str) -> list[float]:
            """At each rate, how many of the test images the first and the last rank differ in."""
            first, last = (torch.tensor(ranks[i][state])[:, known:] for i in (0, -1))
            return [wrong(a, b) for a, b in zip(first, last, strict=True)]

        return {
            "validation": errors("apart", slice(known), data.validation.y),
            "test": errors("apart", slice(known, None), data.test.y),
            "merged": errors("merged", slice(known, None), data.test.y),
            "disagree": disagree("apart"),
            "disagree_merged": disagree("merged"),
        }

    def figure(self, results: Results) -> Figure:
        """Errors by whose statistics."""
        figure, axes = panels("Each rank has half of the classes", "Do the ranks agree?")
        for axis, apart, merged in (
            (axes[0], "test", "merged"),
            (axes[1], "disagree", "disagree_merged"),
        ):
            kept = {
                name: (arm, look)
                for name, (arm, look) in SHOWN.items()
                if arm in results.distinct("arm") and (arm != "one" or apart == "test")
            }
            values = [
                at_best_rate(results, arm, SPLIT, merged if name == "merged" else apart)
                for name, (arm, _) in kept.items()
            ]
            bars(axis, list(kept), values, arms=[look for _, look in kept.values()])
        axes[0].set_ylabel("test error (%)")
        axes[1].set_ylabel("differ (% of test images)")
        for axis in axes:
            axis.set_ylim(bottom=0)
        return finish(figure, len(results.seeds))

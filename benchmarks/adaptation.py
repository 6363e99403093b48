"""What adaptation at inference gains on corrupted digits, and where it harms.

    python benchmarks/adaptation.py [--output benchmarks/adaptation.md]

examples/digits.py's network learns scikit-learn's digits, once for each seed, and answers 600
images that it has not seen: clean, with noise, blurred, with less contrast, shifted to the right
and brighter (they lie between 0 and 1). Numbers are accuracies in percent, the median over seeds,
with the lowest and highest. They were the ground for the defaults of `adapt`.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timing import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.repair.adaptation import Adaptation, Cap, Entropy, adapt
from batchnorm.repair.adaptation import statistics as adapted_statistics
from batchnorm.repair.recalibration import recalibrate

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"


Change = Callable[[Tensor], Tensor]


def clean(x: Tensor) -> Tensor:
    return x


def noise(deviation: float) -> Change:
    def corrupt(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return x + deviation * drawn

    return corrupt


def blur(deviation: float) -> Change:
    line = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * deviation**2))
    kernel = (line[:, None] * line / line.sum() ** 2).view(1, 1, 5, 5)
    return lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel)


def contrast(factor: float) -> Change:
    def corrupt(x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return mean + factor * (x - mean)

    return corrupt


def brighter(by: float) -> Change:
    return lambda x: x + by


def shift(pixels: int) -> Change:
    return lambda x: F.pad(x, (pixels, -pixels, 0, 0))


CORRUPTIONS: dict[str, Change] = {
    "clean": clean,
    "noise 0.2": noise(0.2),
    "noise 0.4": noise(0.4),
    "blur 0.8": blur(0.8),
    "blur 1.2": blur(1.2),
    "contrast 0.4": contrast(0.4),
    "contrast 0.2": contrast(0.2),
    "shift 1": shift(1),
    "shift 2": shift(2),
    "brighter 0.3": brighter(0.3),
    "brighter 1": brighter(1.0),
}
FEW = ["clean", "noise 0.4", "blur 1.2", "contrast 0.2"]


def broken(x: Tensor) -> Tensor:
    """One frame in fifty a hundred times as bright."""
    x = x.clone()
    x[::50] *= 100
    return x


class Subject(NamedTuple):
    """A trained network, and images that it has not seen."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def in_order(self, by_class: bool) -> Subject:
        order = self.labels.argsort(stable=True) if by_class else torch.arange(len(self.labels))
        return Subject(self.model, self.images[order], self.labels[order])


def trained(seed: int, epochs: int) -> Subject:
    example = runpy.run_path(str(EXAMPLE))
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    parts = train_test_split(images, torch.tensor(digits.target), test_size=600, random_state=0)
    loader = DataLoader(TensorDataset(*parts[0::2]), batch_size=64, shuffle=True, drop_last=True)
    torch.manual_seed(seed)
    model = example["ResidualNetwork"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        example["train"](model, loader, optimizer, epoch)
    return Subject(model.eval(), *parts[1::2])


Way = Callable[[Subject], float]
"""From a subject to the part of its images that are answered rightly."""


@torch.no_grad()
def plain(subject: Subject) -> float:
    return accuracy(subject.model, subject, len(subject.labels))


def recalibrated(subject: Subject) -> float:
    """With the running statistics of all the images."""
    model = copy.deepcopy(subject.model)
    recalibrate(model, [subject.images], progress=False)
    return plain(subject._replace(model=model))


def adapted(batch: int, **settings: Any) -> Way:
    def way(subject: Subject) -> float:
        with torch.no_grad(), adapt(subject.model, **settings) as adaptation:
            return accuracy(adaptation, subject, batch)

    return way


def accuracy(model: nn.Module | Adaptation, subject: Subject, batch: int) -> float:
    answers = [model(part).argmax(1) for part in subject.images.split(batch)]
    return float((torch.cat(answers) == subject.labels).double().mean())


@contextmanager
def pooling() -> Iterator[None]:
    """Source and target pooled as moments, with the distance of their means in the variance."""
    weighed = adapted_statistics.mixed

    def pooled(mean: Tensor, var: Tensor, target: Any, n: Tensor, prior: float) -> Any:
        share = n / (prior + n).clamp(min=1e-300)
        between = share * (1 - share) * (target.mean - mean).square()
        mixed_mean, mixed_var = weighed(mean, var, target, n, prior)
        return mixed_mean, mixed_var + between

    adapted_statistics.mixed = pooled
    try:
        yield
    finally:
        adapted_statistics.mixed = weighed


class Study:
    """The trained networks, and how their accuracies are written."""

    def __init__(self, seeds: int, epochs: int) -> None:
        self._subjects = [trained(seed, epochs) for seed in range(seeds)]

    def cell(
        self,
        way: Way,
        corruptions: list[str],
        by_class: bool = False,
        also: Change = clean,
    ) -> str:
        """Over several corruptions the mean, of each seed."""
        found = []
        for subject in self._subjects:
            ordered = subject.in_order(by_class)
            images = [also(CORRUPTIONS[name](ordered.images)) for name in corruptions]
            accuracies = [way(ordered._replace(images=each)) for each in images]
            found.append(100 * statistics.mean(accuracies))
        return f"{statistics.median(found):.1f} ({min(found):.1f}–{max(found):.1f})"

    def orders(self, way: Way) -> list[str]:
        """Clean and corrupted, in mixed order and by class."""
        return [
            self.cell(way, names, by_class)
            for by_class in (False, True)
            for names in (FEW[:1], FEW[1:])
        ]


def rows(head: list[str], body: dict[str, list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in body.items()] + [""]


ORDERS = ["clean", "corrupted", "clean, by class", "corrupted, by class"]


def corruptions(study: Study) -> list[str]:
    ways = {
        "plain": plain,
        "recalibrated": recalibrated,
        "adapt, 8": adapted(8),
        "batch alone, 64": adapted(64, prior=0, memory=None, cap=None),
        "batch alone, 8": adapted(8, prior=0, memory=None, cap=None),
        "adapt + entropy, 64": adapted(64, entropy=Entropy()),
    }
    body = {name: [study.cell(way, [name]) for way in ways.values()] for name in CORRUPTIONS}
    return [
        "## Each corruption",
        "",
        "`adapt` with its defaults in batches of 8, beside the plain network, one recalibrated on",
        "all 600 images, batch statistics without a prior, and entropy minimization.",
        "",
        *rows(["", *ways], body),
    ]


def settings(study: Study) -> list[str]:
    body = {"plain": study.orders(plain)}
    for prior, memory in (
        (0, None), (16, None), (64, None),
        (16, 64), (16, 256), (64, 256), (128, 256), (256, 256), (128, 512), (256, 1024),
    ):  # fmt: skip
        way = adapted(8, prior=prior, memory=memory, cap=None)
        body[f"{prior}, {memory}"] = study.orders(way)
    return [
        "## Prior and memory, in mixed order and sorted by class",
        "",
        "Batches of 8, no cap; corrupted: the mean of noise 0.4, blur 1.2 and contrast 0.2.",
        "",
        *rows(["prior, memory", *ORDERS], body),
    ]


def sizes(study: Study) -> list[str]:
    body = {}
    for name, options in {
        "prior 16, no memory": {"prior": 16, "memory": None},
        "the defaults": {},
    }.items():
        ways = [adapted(batch, **options) for batch in (1, 8, 64)]
        body[name] = [study.cell(way, names) for names in (FEW[:1], FEW[1:]) for way in ways]
    head = [f"{what}, {batch}" for what in ("clean", "corrupted") for batch in (1, 8, 64)]
    return ["## Batch sizes", "", "In mixed order.", "", *rows(["", *head], body)]


def caps(study: Study) -> list[str]:
    columns: dict[str, tuple[list[str], Change]] = {
        "clean, frames broken": (FEW[:1], broken),
        "corrupted, frames broken": (FEW[1:], broken),
        "corrupted": (FEW[1:], clean),
        "brighter 1": (["brighter 1"], clean),
    }
    ways = {"plain": plain}
    for cap in (None, Cap(3, 3), Cap(2, 2), Cap(1, 2), Cap(0.5, 1.5)):
        ways["none" if cap is None else f"{cap.mean:g} σ, ×{cap.std:g}"] = adapted(8, cap=cap)
    body = {
        name: [study.cell(way, names, also=also) for names, also in columns.values()]
        for name, way in ways.items()
    }
    return [
        "## The cap, with one frame in fifty a hundred times as bright",
        "",
        "In mixed order, batches of 8, else the defaults. The broken frames are counted too.",
        "",
        *rows(["cap", *columns], body),
    ]


def formulas(study: Study) -> list[str]:
    alone, remembered = adapted(8, prior=16, memory=None), adapted(8)
    body = {"eq. 1, prior 16, no memory": study.orders(alone)}
    body["eq. 1, the defaults"] = study.orders(remembered)
    with pooling():
        body["pooled, prior 16, no memory"] = study.orders(alone)
        body["pooled, the defaults"] = study.orders(remembered)
    return [
        "## Source and target weighed, or pooled",
        "",
        "Pooled, the mixture's variance has the distance of the two means in it too.",
        "",
        *rows(["", *ORDERS], body),
    ]


def entropies(study: Study) -> list[str]:
    body = {"statistics alone": study.orders(adapted(64))}
    for lr, steps in ((1e-3, 1), (1e-2, 1), (1e-2, 5)):
        way = adapted(64, entropy=Entropy(lr=lr, steps=steps))
        body[f"lr {lr:g}, {steps} {'step' if steps == 1 else 'steps'}"] = study.orders(way)
    return [
        "## Entropy minimization",
        "",
        "Batches of 64, else the defaults.",
        "",
        *rows(["", *ORDERS], body),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, help="write the tables here, as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.seeds, args.epochs)
    lines = ["# Adaptation at inference", "", (__doc__ or "").split("\n\n", 2)[2], machine(), ""]
    for table in (corruptions, settings, sizes, caps, formulas, entropies):
        lines += table(study)
    text = "\n".join(lines)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

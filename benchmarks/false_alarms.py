"""How often the rules that measure are wrong: false alarms on alike data, and what they find.

    python benchmarks/false_alarms.py [--output benchmarks/false_alarms.md]

The rules judge batches, here of 16 samples of 8 channels, 12 of them, in which every channel is
the same distribution times a mixing matrix, so that channels are correlated. Each number is the
part of the runs in which the rule speaks. In the first row of each nothing is wrong, and every
finding is one too many: that is the false-alarm rate, asked for below 1 %. The figure beside the
tables shows the others, the power.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.audit import Rule, audit
from batchnorm.audit.rules.bn103_stale_statistics import StaleStatistics
from batchnorm.audit.rules.bn110_noisy_statistics import NoisyStatistics
from batchnorm.audit.rules.bn123_two_distributions import TwoDistributions
from batchnorm.audit.rules.bn124_sorted_batches import SortedBatches
from batchnorm.audit.rules.bn126_other_data import OtherData

SAMPLES, CHANNELS, BATCHES = 16, 8, 12
DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "normal": torch.randn,
    "exponential": lambda *shape: torch.empty(shape).exponential_(),
    "heavy tails": lambda *shape: torch.distributions.StudentT(3.0).sample(shape),
}


class Source:
    """Data of one distribution with correlated channels."""

    def __init__(self, distribution: str) -> None:
        self._draw = DISTRIBUTIONS[distribution]
        self._mix = torch.eye(CHANNELS) + 0.5 * torch.randn(CHANNELS, CHANNELS)
        self.spread = self._draw(4096, CHANNELS).matmul(self._mix).std(0)

    def batches(self, count: int = BATCHES, samples: int = SAMPLES) -> list[Tensor]:
        return list(self._draw(count, samples, CHANNELS) @ self._mix)

    def trained(self) -> nn.BatchNorm1d:
        layer = nn.BatchNorm1d(CHANNELS)
        for batch in self.batches(60):
            layer(batch)
        return layer


class Twice(nn.Module):
    """One layer, called on both halves of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, 0]) + self.norm(x[:, 1])


def finds(rule: type[Rule], model: nn.Module, batches: Iterable[Tensor], **options: object) -> bool:
    report = audit(model, batches, rules=[rule], **options)  # type: ignore[arg-type]
    assert not report.disabled, report.disabled
    return bool(report.findings)


def stale(source: Source, shift: float) -> bool:
    """A trained layer whose running mean is then moved."""
    layer = source.trained()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean += shift * layer.running_var.sqrt()
    return finds(StaleStatistics, layer, source.batches())


def noisy(source: Source, fewer: float) -> bool:
    """Batches of fewer samples."""
    batches = source.batches(samples=round(SAMPLES / fewer))
    return finds(NoisyStatistics, nn.BatchNorm1d(CHANNELS), batches)


def two(source: Source, shift: float) -> bool:
    """A layer that is called twice, the second time with data that lie elsewhere."""
    pairs = zip(source.batches(), source.batches(), strict=True)
    batches = [torch.stack([one, other + shift * source.spread], 1) for one, other in pairs]
    return finds(TwoDistributions, Twice(), batches)


def apart(source: Source, between: float) -> bool:
    """Batches that are moved apart at random."""
    moved = between * source.spread * torch.randn(BATCHES, 1, CHANNELS)
    batches = torch.stack(source.batches()) + moved
    return finds(SortedBatches, nn.BatchNorm1d(CHANNELS), batches)


def elsewhere(source: Source, shift: float) -> bool:
    """A trained layer, and deployment's data that lie elsewhere."""
    deploy = [batch + shift * source.spread for batch in source.batches()]
    return finds(OtherData, source.trained(), source.batches(), deploy=deploy)


class Subject(NamedTuple):
    speaks: Callable[[Source, float], bool]
    effect: str
    sizes: list[float]  # the first: nothing is wrong


SHIFTS = [0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0]
SUBJECTS = {
    "BN103": Subject(stale, "running mean moved by, σ", SHIFTS),
    "BN110": Subject(noisy, "16 samples divided by", [1, 1.6, 2, 2.67, 3.2, 4, 5.34, 8]),
    "BN123": Subject(two, "second call moved by, σ", SHIFTS),
    "BN124": Subject(apart, "batches moved apart by, σ", [0, 0.1, 0.2, 0.25, 0.3, 0.5, 1]),
    "BN126": Subject(elsewhere, "deployment moved by, σ", SHIFTS),
}


def rates(subject: Subject, runs: int) -> dict[float, dict[str, float]]:
    """By effect and by distribution, the part of the runs in which the rule speaks."""
    found: dict[float, dict[str, float]] = {}
    for size in subject.sizes:
        times = runs if size == subject.sizes[0] else runs // 10
        found[size] = {
            name: sum(subject.speaks(Source(name), size) for _ in range(times)) / times
            for name in DISTRIBUTIONS
        }
    return found


def draw(measured: dict[str, dict[float, dict[str, float]]], path: Path) -> None:
    """Power against effect size, a panel a rule."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "batchnorm"  # the same file from the same numbers
    figure, panels = plt.subplots(1, len(measured), figsize=(3 * len(measured), 3), sharey=True)
    for panel, (code, by_size) in zip(panels, measured.items(), strict=True):
        for name, style in zip(DISTRIBUTIONS, ("-o", "--s", ":^"), strict=True):
            powers = [100 * by_name[name] for by_name in by_size.values()]
            panel.plot(list(by_size), powers, style, label=name, markersize=4)
        panel.set(title=code, xlabel=SUBJECTS[code].effect)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("runs in which it speaks, %")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="for the false alarms; a tenth else")
    parser.add_argument(
        "--output", type=Path, help="write the tables here, as Markdown, and an SVG"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = ["# False alarms, and what is found", "", (__doc__ or "").split("\n\n", 2)[2]]
    measured = {}
    for code, subject in SUBJECTS.items():
        measured[code] = rates(subject, args.runs)
        text += [f"## {code}", "", f"| {subject.effect} | runs | {' | '.join(DISTRIBUTIONS)} |"]
        text.append("|---" * (2 + len(DISTRIBUTIONS)) + "|")
        for size, by_name in measured[code].items():
            runs = args.runs if size == subject.sizes[0] else args.runs // 10
            cells = " | ".join(f"{rate:.1%}" for rate in by_name.values())
            text.append(f"| {size:g} | {runs} | {cells} |")
        text.append("")
    print("\n".join(text))
    if args.output is not None:
        figure = args.output.with_suffix(".svg")
        draw(measured, figure)
        text.append(f"![Power of each rule against the size of the effect]({figure.name})\n")
        args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()

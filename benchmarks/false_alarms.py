"""How often the rules that measure are wrong: false alarms on alike data, and what they find.

    python benchmarks/false_alarms.py [--output benchmarks/false_alarms.md]

BN103 (running statistics far from the data's) and BN124 (batches that are not alike) judge
batches, here of 16 samples of 8 channels, 12 of them, in which every channel is the same
distribution times a mixing matrix, so that channels are correlated. Each number is the part of
the runs in which the rule speaks. The first row of each is the false-alarm rate: nothing is
wrong there, and every finding is one too many. Both are asked for below 1 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.audit import audit
from batchnorm.audit.rules.bn103_stale_statistics import StaleStatistics
from batchnorm.audit.rules.bn124_sorted_batches import SortedBatches

SAMPLES, CHANNELS, BATCHES = 16, 8, 12
DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "normal": torch.randn,
    "exponential": lambda *shape: torch.empty(shape).exponential_(),
    "heavy tails": lambda *shape: torch.distributions.StudentT(3.0).sample(shape),
}


def batches(distribution: str, between: float = 0.0) -> list[Tensor]:
    """Correlated channels; each batch is moved by `between` standard deviations at random."""
    x = DISTRIBUTIONS[distribution](BATCHES, SAMPLES, CHANNELS)
    mix = torch.eye(CHANNELS) + 0.5 * torch.randn(CHANNELS, CHANNELS)
    x = x @ mix
    return list(x + between * x.std() * torch.randn(BATCHES, 1, CHANNELS))


def speaks_stale(distribution: str, shift: float) -> bool:
    """BN103, on a layer trained on such data whose running mean is then moved by `shift`."""
    mix = torch.eye(CHANNELS) + 0.5 * torch.randn(CHANNELS, CHANNELS)
    draw = DISTRIBUTIONS[distribution]
    layer = nn.BatchNorm1d(CHANNELS)
    for _ in range(60):
        layer(draw(SAMPLES, CHANNELS) @ mix)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean += shift * layer.running_var.sqrt()
    given = [draw(SAMPLES, CHANNELS) @ mix for _ in range(BATCHES)]
    return bool(audit(layer, given, rules=[StaleStatistics]).findings)


def speaks_sorted(distribution: str, between: float) -> bool:
    """BN124, on batches moved apart."""
    layer = nn.BatchNorm1d(CHANNELS)
    return bool(audit(layer, batches(distribution, between), rules=[SortedBatches]).findings)


RULES: dict[str, tuple[Callable[[str, float], bool], str, list[float]]] = {
    "BN103": (speaks_stale, "running mean moved by, σ", [0.0, 0.25, 0.5, 0.75, 1.0]),
    "BN124": (speaks_sorted, "batches moved apart by, σ", [0.0, 0.1, 0.25, 0.5, 1.0]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="for the false alarms; a tenth else")
    parser.add_argument("--output", type=Path, help="write the tables here, as Markdown")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = ["# False alarms, and what is found", "", (__doc__ or "").split("\n\n", 2)[2]]
    for code, (speaks, what, effects) in RULES.items():
        text += [f"## {code}", "", f"| {what} | runs | {' | '.join(DISTRIBUTIONS)} |"]
        text.append("|---" * (2 + len(DISTRIBUTIONS)) + "|")
        for effect in effects:
            runs = args.runs if effect == 0 else args.runs // 10
            rates = [sum(speaks(d, effect) for _ in range(runs)) / runs for d in DISTRIBUTIONS]
            text.append(f"| {effect:g} | {runs} | {' | '.join(f'{r:.1%}' for r in rates)} |")
        text.append("")
    print("\n".join(text))
    if args.output is not None:
        args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()

"""What watching costs: training steps of examples/digits.py's network, watched and unwatched.

    python benchmarks/watching.py [--output benchmarks/watching.md]

Blocks of steps take turns in one process. Beside them stands the time of copying the network's
largest activation, which says how much of the cost is memory. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import in_turns, machine, ratio
from torch import Tensor, nn

from batchnorm.audit import Probe

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"
BATCH = (64, 1, 8, 8)
BLOCK = 16  # steps; the rules look closer at every fourth


def trainer(model: nn.Module) -> Callable[[], None]:
    """One training step, as the example makes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(BATCH), torch.randint(10, BATCH[:1])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def largest_activation(model: nn.Module) -> Tensor:
    outputs: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda *call: outputs.append(call[2]))
        for part in model.children()
    ]
    with torch.no_grad():
        model(torch.randn(BATCH))
    for handle in handles:
        handle.remove()
    return max(outputs, key=Tensor.numel).clone()


def spread(seconds: list[float], unit: float) -> str:
    """The median, with the 20th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5)
    low, middle, high = (s / unit for s in (fifths[0], statistics.median(seconds), fifths[-1]))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def rows(rounds: int) -> list[str]:
    torch.manual_seed(0)
    model: nn.Module = runpy.run_path(str(EXAMPLE))["ResidualNetwork"]()
    activation, step, probe = largest_activation(model), trainer(model), Probe()

    def steps() -> None:
        for _ in range(BLOCK):
            step()

    def watched_steps() -> None:
        with probe:
            steps()

    def copies() -> None:
        for _ in range(BLOCK):
            activation.clone()

    blocks = in_turns({"step": steps, "watched": watched_steps, "copy": copies}, rounds)
    times = {name: [s / BLOCK for s in seconds] for name, seconds in blocks.items()}
    report = probe.report()
    assert not report.disabled, report.disabled
    calls = report.calls / (BLOCK * (rounds + 3))  # three more to warm up
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    added = (median["watched"] - median["step"]) / calls
    shape = "×".join(map(str, activation.shape))
    return [
        "| | median (20 % to 80 %) |",
        "|---|---|",
        f"| training step, ms | {spread(times['step'], 1e-3)} |",
        f"| training step watched, ms | {spread(times['watched'], 1e-3)} |",
        f"| watched / unwatched | {ratio(times['watched'], times['step'])} |",
        f"| added by each of {calls:.0f} layer calls, µs | {added * 1e6:.0f} |",
        f"| copying the largest activation, {shape}, µs | {spread(times['copy'], 1e-6)} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150, help="blocks of each kind")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args()
    text = "\n".join(["# Watching a training run", "", machine(), "", *rows(args.rounds), ""])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

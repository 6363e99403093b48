"""What watching costs: training steps of two networks, watched and unwatched.

    python benchmarks/watching.py [--output benchmarks/watching.md]

One is examples/digits.py's, whose steps are short; the other has ResNet-18's size, 20 batch norms
between 64 and 512 channels, with 16 images of 64×64. Blocks of steps take turns in one process.
Beside them stands the time of copying the network's largest activation, which says how much of the
cost is memory. Nothing else should run meanwhile.
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


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, given: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or given != channels:
            self.shortcut.append(nn.Conv2d(given, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    given = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(given, channels, stride), Block(channels, channels, 1)]
        given = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def digits() -> nn.Module:
    model: nn.Module = runpy.run_path(str(EXAMPLE))["ResidualNetwork"]()
    return model


def trainer(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """One training step, as the example makes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(shape), torch.randint(10, shape[:1])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def largest_activation(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    outputs: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda *call: outputs.append(call[2]))
        for part in model.children()
    ]
    with torch.no_grad():
        model(torch.randn(shape))
    for handle in handles:
        handle.remove()
    return max(outputs, key=Tensor.numel).clone()


def spread(seconds: list[float], unit: float) -> str:
    """The median, with the 20th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5)
    low, middle, high = (s / unit for s in (fifths[0], statistics.median(seconds), fifths[-1]))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def rows(
    make: Callable[[], nn.Module], images: tuple[int, ...], rounds: int, block: int
) -> list[str]:
    """`block` steps in a turn: the rules look closer at every fifth pass and every twentieth."""
    torch.manual_seed(0)
    model = make()
    activation, step, probe = largest_activation(model, images), trainer(model, images), Probe()

    def steps() -> None:
        for _ in range(block):
            step()

    def watched_steps() -> None:
        with probe:
            steps()

    def copies() -> None:
        for _ in range(block):
            activation.clone()

    blocks = in_turns({"step": steps, "watched": watched_steps, "copy": copies}, rounds)
    times = {name: [s / block for s in seconds] for name, seconds in blocks.items()}
    report = probe.report()
    assert not report.disabled, report.disabled
    calls = report.calls / (block * (rounds + 3))  # three more to warm up
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
    lines = ["# Watching a training run", "", machine(), "", "## The digits' network", ""]
    lines += rows(digits, (64, 1, 8, 8), args.rounds, block=20)
    lines += ["", "## ResNet-18's size, 16×3×64×64; goal: 1.03", ""]
    lines += rows(resnet18, (16, 3, 64, 64), args.rounds // 15, block=20)
    text = "\n".join([*lines, ""])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

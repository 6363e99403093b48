"""What rematerialization saves, and costs: activation memory and time of a training step.

    python benchmarks/memory.py [--output benchmarks/memory.md]

Each network with torch.nn's layers (the ReLU in place), with ours, and with ours rematerialized.
Memory is a process's resident memory over what it was before the step: after the forward pass,
when everything is kept that the backward pass needs, and at its peak. Each is measured in a
process of its own, whose allocator gives tensors back at once, so that this is what is in use.
Time is that of steps in turns in one process, whose allocator keeps its memory, with the 20th and
80th percentile of the rounds' ratios. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import KEPT, in_turns, machine, ratio
from torch import Tensor, nn

import batchnorm

RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
KINDS = ("torch.nn", "ours", "rematerialized")


class TorchNorm(nn.Module):
    """torch.nn's batch norm, with what ours fuses behind it."""

    def __init__(self, channels: int, act: bool) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels), act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return nn.functional.relu(y, inplace=True) if self.act else y


class OurNorm(nn.Module):
    def __init__(self, channels: int, act: bool) -> None:
        super().__init__()
        self.norm = batchnorm.BatchNorm2d(channels, act="relu" if act else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual=residual)


Norm = Callable[[int, bool], nn.Module]


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class ConvNorm(nn.Sequential):
    def __init__(self, norm: Norm, *shape: int, act: bool = True) -> None:
        convolution = conv(*shape)
        super().__init__(convolution, norm(convolution.out_channels, act))


class Residual(nn.Module):
    """The branch's last norm adds the shortcut, which is projected where the shape changes."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int, branch: list) -> None:
        super().__init__()
        self.branch, self.last, self.norm = (
            nn.Sequential(*branch[:-1]),
            branch[-1],
            norm(outputs, True),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = ConvNorm(norm, inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(self.branch(x)), residual=self.shortcut(x))


def basic(norm: Norm, inputs: int, outputs: int, stride: int) -> Residual:
    branch = [ConvNorm(norm, inputs, outputs, 3, stride), conv(outputs, outputs)]
    return Residual(norm, inputs, outputs, stride, branch)


def bottleneck(norm: Norm, inputs: int, outputs: int, stride: int) -> Residual:
    inner = outputs // 4
    branch = [
        ConvNorm(norm, inputs, inner, 1),
        ConvNorm(norm, inner, inner, 3, stride),
        conv(inner, outputs, 1),
    ]
    return Residual(norm, inputs, outputs, stride, branch)


class PreActivation(nn.Module):
    def __init__(self, norm: Norm, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels, True), conv(channels, channels)
        self.norm2, self.conv2 = norm(channels, True), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Dense(nn.Module):
    """One layer of a DenseNet: what it computes is put beside what it was given."""

    def __init__(self, norm: Norm, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs, True), conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = norm(4 * growth, True), conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv2(self.norm2(self.conv1(self.norm1(x))))), 1)


class Inverted(nn.Module):
    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 6 * inputs
        self.branch = nn.Sequential(
            ConvNorm(norm, inputs, inner, 1),
            ConvNorm(norm, inner, inner, 3, stride, inner),
            conv(inner, outputs, 1),
        )
        self.norm, self.adds = norm(outputs, False), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.branch(x), residual=x if self.adds else None)


def stages(norm: Norm, block: Callable, widths: list[tuple[int, int, int]], inputs: int) -> list:
    made = []
    for outputs, blocks, stride in widths:
        for i in range(blocks):
            made.append(block(norm, inputs, outputs, stride if i == 0 else 1))
            inputs = outputs
    return made


def network(name: str, norm: Norm) -> tuple[nn.Module, tuple[int, ...]]:
    """A network that ends in an image-wide mean and ten classes, and its input's shape."""
    if name == "chain of 12 conv-BN-ReLU":
        body, width = [ConvNorm(norm, 3, 64), *(ConvNorm(norm, 64, 64) for _ in range(11))], 64
        shape = (16, 3, 64, 64)
    elif name == "pre-activation ResNet":
        body, width = [conv(3, 64), *(PreActivation(norm, 64) for _ in range(8))], 64
        shape = (16, 3, 64, 64)
    elif name == "ResNet-18":
        widths = [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)]
        stem = [ConvNorm(norm, 3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
        body, width = [*stem, *stages(norm, basic, widths, 64)], 512
        shape = (16, 3, 224, 224)
    elif name == "bottlenecks, as ResNet-50":
        widths = [(256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)]
        stem = [ConvNorm(norm, 3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
        body, width = [*stem, *stages(norm, bottleneck, widths, 64)], 2048
        shape = (8, 3, 224, 224)
    elif name == "DenseNet":
        layers = [Dense(norm, 64 + 32 * i, 32) for i in range(8)]
        body, width = [conv(3, 64), *layers, norm(64 + 32 * 8, True)], 64 + 32 * 8
        shape = (16, 3, 64, 64)
    else:
        widths = [(24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2)]
        body = [ConvNorm(norm, 3, 16, 3, 2), *stages(norm, Inverted, widths, 16)]
        width, shape = 160, (16, 3, 224, 224)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*body, *head), shape


NETWORKS = (
    "chain of 12 conv-BN-ReLU",
    "pre-activation ResNet",
    "ResNet-18",
    "bottlenecks, as ResNet-50",
    "DenseNet",
    "inverted bottlenecks, as MobileNetV2",
)


def resident(field: str) -> int:
    """Bytes of `VmRSS` now, or of `VmHWM`, its peak since it was last cleared."""
    status = Path("/proc/self/status").read_text()
    return next(int(s.split()[1]) * 1024 for s in status.splitlines() if s.startswith(field))


def step(name: str, kind: str) -> Callable[[], Tensor]:
    """The loss of one forward pass, as a function to call."""
    torch.manual_seed(0)
    model, shape = network(name, TorchNorm if kind == "torch.nn" else OurNorm)
    if kind == "rematerialized":
        batchnorm.rematerialize(model)
    x, labels = torch.randn(shape), torch.randint(10, shape[:1])
    return lambda: nn.functional.cross_entropy(model(x), labels)


def use(name: str, kind: str) -> dict[str, float]:
    """Bytes of one step after its forward pass and at its peak, and its loss."""
    forward = step(name, kind)
    for _ in range(2):  # kernels compiled, gradients allocated
        forward().backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # clears the peak
    loss = forward()
    after = resident("VmRSS")
    loss.backward()
    return {
        "after": after - before,
        "peak": resident("VmHWM") - before,
        "loss": loss.item(),
    }


def times(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of each kind, in turns."""
    forwards = {kind: step(name, kind) for kind in KINDS}
    work = {kind: lambda f=forward: f().backward() for kind, forward in forwards.items()}
    return in_turns(work, rounds)


def in_a_process(variables: dict[str, str], *words: str) -> dict:
    command = [sys.executable, __file__, *words]
    done = subprocess.run(
        command, env=os.environ | variables, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def rows(rounds: int) -> list[str]:
    lines = [
        "| network | after forward, MB: torch.nn | ours | rematerialized | saved "
        "| peak, MB: torch.nn | ours | rematerialized | saved "
        "| step, rematerialized / ours | step, rematerialized / torch.nn |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        memory = [in_a_process(RETURNED, "--use", name, kind) for kind in KINDS]
        assert memory[1]["loss"] == memory[2]["loss"]
        seconds = in_a_process(KEPT, "--times", name, "--rounds", str(rounds))
        cells = [name]
        for field in ("after", "peak"):
            sizes = [m[field] for m in memory]
            cells += [f"{size / 1e6:.0f}" for size in sizes]
            cells.append(f"{1 - sizes[2] / sizes[0]:.0%}")
        cells += [ratio(seconds["rematerialized"], seconds[kind]) for kind in ("ours", "torch.nn")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--use", nargs=2, help="one network and kind, as JSON; for itself")
    parser.add_argument("--times", help="one network, as JSON; for itself")
    args = parser.parse_args()
    if args.use is not None:
        print(json.dumps(use(*args.use)))
        return
    if args.times is not None:
        print(json.dumps(times(args.times, args.rounds)))
        return
    about = (__doc__ or "").split("\n\n", 2)[2]
    text = "\n".join(["# Rematerialization", "", machine(), "", about, *rows(args.rounds), ""])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

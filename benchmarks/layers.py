"""The layers against torch.nn's: BN, BN + ReLU and BN + add + ReLU, in training and frozen.

    python benchmarks/layers.py [--output benchmarks/layers.md]

Each number is torch eager's time over ours: above 1 we are faster. Beside them stand both times
in copies of the same tensor, the floor of anything that reads and writes it once; a forward pass
cannot do with less than one copy, a backward pass with less than one and a half. Measured twice,
in processes of their own: with the system's allocator, which hands large tensors back to the
system and pays for fresh pages each time, and with one that keeps its memory. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import KEPT, laps_in_turns, machine, ratio
from torch import Tensor, nn

import batchnorm

SHAPES = [
    *((32, c, s, s) for c, s in ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28))),
    *((32, c, s, s) for c, s in ((256, 14), (1024, 14), (512, 7), (2048, 7))),  # ResNet-50
    (128, 64, 32, 32),
    (256, 64, 8, 8),
    (16, 16, 8, 8),
    *((256, 512), (4096, 64), (4096, 1024), (262144, 64)),
    (64, 128, 400),
    (4, 32, 16, 56, 56),
]
COMPILED = [(32, 64, 56, 56), (32, 512, 7, 7), (4096, 64)]
ALLOCATORS = {"memory kept": KEPT, "system's default": {}}
OPERATIONS = ("BN", "BN+ReLU", "BN+add+ReLU")
LARGE = 16 * 2**20  # bytes


def candidate(
    layer: nn.Module, forward: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor
) -> Callable[[], Iterator[None]]:
    """A forward and a backward pass; gradients are returned, not added up."""
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    inputs = [x.clone().requires_grad_(), *layer.parameters()]

    def work() -> Iterator[None]:
        y = forward(layer, inputs[0], residual)
        yield
        torch.autograd.grad(y, inputs, dy)
        yield

    return work


def theirs(operation: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    return {
        "BN": lambda layer, x, _: layer(x),
        "BN+ReLU": lambda layer, x, _: F.relu(layer(x), inplace=True),
        "BN+add+ReLU": lambda layer, x, residual: F.relu(layer(x).add_(residual), inplace=True),
    }[operation]


def ours(operation: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    if operation == "BN+add+ReLU":
        return lambda layer, x, residual: layer(x, residual=residual)
    return lambda layer, x, _: layer(x)


def layers(shape: tuple[int, ...], operation: str, frozen: bool) -> tuple[nn.Module, nn.Module]:
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    act = None if operation == "BN" else "relu"
    both = getattr(nn, name)(shape[1]), getattr(batchnorm, name)(shape[1], act=act)
    return both[0].train(not frozen), both[1].train(not frozen)


def cases() -> Iterator[tuple[tuple[int, ...], str, Tensor]]:
    for shape in SHAPES:
        yield shape, "contiguous", torch.randn(shape)
        if len(shape) > 3:
            last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            yield shape, "channels_last", torch.randn(shape).contiguous(memory_format=last)


def measure(seconds_each: float) -> list[dict[str, object]]:
    """Every case in every operation and mode, as rows of plain numbers."""
    rows: list[dict[str, object]] = []
    for shape, layout, x in cases():
        for operation in OPERATIONS:
            for frozen in (False, True):
                torch_layer, our_layer = layers(shape, operation, frozen)

                def copy(x: Tensor = x) -> Iterator[None]:
                    x.clone()
                    yield

                work = {
                    "torch": candidate(torch_layer, theirs(operation), x),
                    "ours": candidate(our_layer, ours(operation), x),
                    "copy": copy,
                }
                guess = x.numel() * 2.5e-9 + 4e-4
                rounds = max(9, min(300, int(seconds_each / guess)))
                laps = laps_in_turns(work, rounds)
                row: dict[str, object] = {
                    "shape": "×".join(map(str, shape)),
                    "layout": layout,
                    "bytes": x.numel() * x.element_size(),
                    "operation": operation,
                    "frozen": frozen,
                    "copy": statistics.median(t for (t,) in laps["copy"]),
                }
                for part, pick in (("forward", 0), ("backward", 1), ("both", None)):
                    times = {
                        name: [sum(t) if pick is None else t[pick] for t in laps[name]]
                        for name in ("torch", "ours")
                    }
                    row[part] = {name: statistics.median(t) for name, t in times.items()}
                    row[f"{part} spread"] = ratio(times["torch"], times["ours"])
                rows.append(row)
    return rows


def compiled() -> list[str]:
    """torch.compile of torch's own layers, and of ours, which is one opaque call there."""
    lines = [
        "| shape | eager / ours | compiled / ours | ours compiled / ours |",
        "|---|---|---|---|",
    ]
    for shape in COMPILED:
        torch_layer, our_layer = layers(shape, "BN+ReLU", False)
        forward, x = theirs("BN+ReLU"), torch.randn(shape)

        class Both(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.layer(x))

        laps = laps_in_turns(
            {
                "eager": candidate(torch_layer, forward, x),
                "compiled": candidate(
                    torch.compile(Both(torch_layer), dynamic=False), ours("BN+ReLU"), x
                ),
                "ours": candidate(our_layer, ours("BN+ReLU"), x),
                "ours compiled": candidate(
                    torch.compile(our_layer, dynamic=False), ours("BN+ReLU"), x
                ),
            },
            30,
        )
        times = {name: [sum(t) for t in lap] for name, lap in laps.items()}
        others = (ratio(times[name], times["ours"]) for name in laps if name != "ours")
        lines.append(f"| {'×'.join(map(str, shape))} | {' | '.join(others)} |")
    return lines


def mean(values: list[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, values))):.2f}"


def speedup(row: dict, part: str = "both") -> float:
    return row[part]["torch"] / row[part]["ours"]


def summary(rows: list[dict]) -> list[str]:
    """Geometric means, the slowest case, and how near the large ones come to the floor."""
    lines = [
        "| forward and backward | geometric mean | contiguous | channels_last | least |",
        "|---|---|---|---|---|",
    ]
    for frozen in (False, True):
        for operation in OPERATIONS:
            some = [r for r in rows if r["operation"] == operation and r["frozen"] is frozen]
            worst = min(some, key=speedup)
            parts = [
                mean([speedup(r) for r in some if r["layout"] in layouts])
                for layouts in (
                    ("contiguous", "channels_last"),
                    ("contiguous",),
                    ("channels_last",),
                )
            ]
            mode = "frozen" if frozen else "training"
            lines.append(
                f"| {operation}, {mode} | {' | '.join(parts)} "
                f"| {speedup(worst):.2f} ({worst['shape']}, {worst['layout']}) |"
            )
    return lines


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| shape | layout | BN | BN+ReLU (20 % to 80 %) | forward | backward | BN+add+ReLU "
        "| frozen BN+ReLU | ours in copies | torch in copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for relu in (r for r in rows if r["operation"] == "BN+ReLU" and not r["frozen"]):
        same = [r for r in rows if (r["shape"], r["layout"]) == (relu["shape"], relu["layout"])]
        by_kind = {(r["operation"], r["frozen"]): r for r in same}
        lines.append(
            f"| {relu['shape']} | {relu['layout']} "
            f"| {speedup(by_kind['BN', False]):.2f} | {relu['both spread']} "
            f"| {speedup(relu, 'forward'):.2f} | {speedup(relu, 'backward'):.2f} "
            f"| {speedup(by_kind['BN+add+ReLU', False]):.2f} "
            f"| {speedup(by_kind['BN+ReLU', True]):.2f} "
            f"| {relu['both']['ours'] / relu['copy']:.1f} "
            f"| {relu['both']['torch'] / relu['copy']:.1f} |"
        )
    return lines


def floors(rows: list[dict]) -> list[str]:
    """The large tensors, where memory is all: BN + ReLU over the least number of copies."""
    lines = [
        "| over 16 MB, training | floor, copies | ours / floor, median | worst |",
        "|---|---|---|---|",
    ]
    for layout, floor in (("contiguous", 2.5), ("channels_last", 4.0)):
        over = [
            r["both"]["ours"] / r["copy"] / floor
            for r in rows
            if r["layout"] == layout and r["bytes"] > LARGE
            if r["operation"] == "BN+ReLU" and not r["frozen"]
        ]
        lines.append(f"| {layout} | {floor} | {statistics.median(over):.2f} | {max(over):.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="about, for each candidate")
    parser.add_argument("--output", type=Path, help="write the tables here, as Markdown")
    parser.add_argument("--rows", action="store_true", help="one allocator's, as JSON; for itself")
    args = parser.parse_args()
    if args.rows:
        json.dump(measure(args.seconds), sys.stdout)
        return
    about = (__doc__ or "").split("\n\n", 2)[2]
    text = [f"# Layers: torch eager's time over ours\n\n{machine()}\n\n{about}"]
    for name, variables in ALLOCATORS.items():
        command = [sys.executable, __file__, "--rows", "--seconds", str(args.seconds)]
        output = subprocess.run(
            command, env=os.environ | variables, check=True, capture_output=True, text=True
        ).stdout
        rows = json.loads(output)
        text += [f"## Allocator: {name}", "", *summary(rows), ""]
        text += [*floors(rows), "", *table(rows), ""]
    text += ["## torch.compile, BN + ReLU, forward and backward", "", *compiled(), ""]
    print("\n".join(text))
    if args.output is not None:
        args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()

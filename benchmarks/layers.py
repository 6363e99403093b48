"""The layers against torch.nn's: BN + ReLU, forward and backward, in training and frozen.

    python benchmarks/layers.py [--output benchmarks/layers.md]

Each row gives our time over torch eager's, and both over a copy of the same tensor, which is the
floor of anything that reads and writes it once. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import in_turns, machine, ratio
from torch import nn

import batchnorm

SHAPES = [(16, 16, 8, 8), (128, 64, 32, 32), (32, 64, 56, 56), (32, 256, 14, 14), (4096, 64)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def candidates(
    shape: tuple[int, ...], layout: torch.memory_format, frozen: bool
) -> dict[str, Callable[[], object]]:
    rank = f"BatchNorm{max(len(shape) - 2, 1)}d"
    theirs = getattr(nn, rank)(shape[1]).train(not frozen)
    ours = getattr(batchnorm, rank)(shape[1], act="relu").train(not frozen)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    dy = torch.randn(shape).to(memory_format=layout)
    return {
        "torch": lambda: F.relu(theirs(x), inplace=True).backward(dy),
        "ours": lambda: ours(x).backward(dy),
        "copy": x.detach().clone,
    }


def rows(rounds: int) -> list[str]:
    lines = [
        "| shape | layout | mode | ours / torch (20 % to 80 %) | ours / copy | torch / copy |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for name, layout in LAYOUTS.items():
            if len(shape) != 4 and name == "channels_last":
                continue
            for frozen in (False, True):
                times = in_turns(candidates(shape, layout, frozen), rounds)
                ours, theirs, copy = (
                    statistics.median(times[k]) for k in ("ours", "torch", "copy")
                )
                mode = "frozen" if frozen else "training"
                lines.append(
                    f"| {'×'.join(map(str, shape))} | {name} | {mode} "
                    f"| {ratio(times['ours'], times['torch'])} "
                    f"| {ours / copy:.1f} | {theirs / copy:.1f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args()
    text = "\n".join(
        ["# BN + ReLU, forward and backward", "", machine(), "", *rows(args.rounds), ""]
    )
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

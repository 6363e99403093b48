"""What `batchnorm check` of a large checkpoint costs: seconds and the largest memory.

    python benchmarks/checkpoints.py [--output benchmarks/checkpoints.md]

A checkpoint of a gigabyte of convolutions with their batch norms is written to a temporary
folder in each format, and checked by the command in a process of its own, several times. Beside
it stands the time of the command on a checkpoint of a kilobyte, which is Python's and PyTorch's
start.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import machine
from torch import Tensor, nn

CHANNELS, LAYERS = 512, 109  # 512 × 512 × 3 × 3 in float32: 9.4 MB a convolution
GOALS = "goals: 10 s and 1.5 GB"


def state(layers: int, channels: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(layers):
        norm = nn.BatchNorm2d(channels)
        norm(torch.randn(2, channels, 4, 4))
        tensors[f"layers.{i}.conv.weight"] = torch.randn(channels, channels, 3, 3)
        tensors |= {f"layers.{i}.norm.{name}": t for name, t in norm.state_dict().items()}
    return tensors


def checked(path: Path) -> float:
    """Seconds of one check, which must find every layer and nothing wrong."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "batchnorm", "check", "--strict", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "batchnorm checked" in result.stdout
    return time.perf_counter() - start


def row(path: Path, rounds: int) -> str:
    """Measured in a process of its own, whose children's largest memory is this file's alone."""
    command = [sys.executable, __file__, "--check", str(path), "--rounds", str(rounds)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    low, middle, high, memory = map(float, said.split())
    size = path.stat().st_size / 1e9
    return (
        f"| `{path.suffix}` | {size:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {memory:.2f} |"
    )


def measure(path: Path, rounds: int) -> None:
    seconds = sorted(checked(path) for _ in range(rounds))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(seconds[0], statistics.median(seconds), seconds[-1], memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args()
    if args.check is not None:
        measure(args.check, args.rounds)
        return
    torch.manual_seed(0)
    lines = ["# Checking a large checkpoint", "", f"{machine()}; {GOALS}", ""]
    lines += ["| file | GB | s, median (least to most) | largest memory, GB |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for layers, channels in ((1, 4), (LAYERS, CHANNELS)):
            for suffix in (".safetensors", ".pt"):
                path = Path(folder) / f"model{suffix}"
                tensors = state(layers, channels)
                if suffix == ".pt":
                    torch.save({"state_dict": tensors, "epoch": 90}, path)
                else:
                    save_file(tensors, path)
                del tensors
                lines.append(row(path, args.rounds))
                path.unlink()
    text = "\n".join([*lines, ""])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

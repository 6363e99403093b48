"""What folding gains: networks before and after, their time, their answers, and the norms left.

    python benchmarks/folding.py [--output benchmarks/folding.md]

Networks of pytorchcv with random weights, statistics, γ and β, on images of 96×96; the VGG with a
small head. Time is that of a pass before over that after, in turns in one process on one thread,
with the 20th and 80th percentile of the rounds' ratios; above 1 folding gains. The difference is
the largest of any output relative to the largest output. What is left are batch norms between a
concatenation, or the pooling behind it, and an activation.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from pytorchcv.models.densenet import densenet121
from pytorchcv.models.mobilenetv2 import mobilenetv2_w1
from pytorchcv.models.resnet import resnet18
from pytorchcv.models.vgg import VGG
from timing import in_turns, machine, ratio
from torch import Tensor, nn

from batchnorm.repair.folding import fold

SIZE = 96
BATCHES = (1, 4)


def ended(network: nn.Module) -> nn.Module:
    """For images of any size."""
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return network


def vgg11() -> nn.Module:
    network = VGG([[64], [128], [256, 256], [512, 512], [512, 512]], use_bn=True, num_classes=1)
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    network.output = nn.Sequential(nn.Flatten(), nn.Linear(512, 1000))
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: ended(resnet18()),
    "MobileNetV2": lambda: ended(mobilenetv2_w1()),
    "VGG-11": vgg11,
    "DenseNet-121": lambda: ended(densenet121()),
}


def trained(network: nn.Module) -> nn.Module:
    """In eval mode, with batch norms as no network begins with them."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return network.eval()


def passes(network: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return network(x)

    return run


def rows(rounds: int) -> list[str]:
    heads = [f"{n} {'image' if n == 1 else 'images'} (20 % to 80 %)" for n in BATCHES]
    lines = [
        f"| network | norms folded | difference | {' | '.join(heads)} | parameters fewer |",
        "|---|---|---|" + "---|" * len(BATCHES) + "---|",
    ]
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        before = trained(make())
        after = copy.deepcopy(before)
        folding = fold(after, torch.randn(2, 3, SIZE, SIZE), repeats=0)
        gains = []
        for n in BATCHES:
            x = torch.randn(n, 3, SIZE, SIZE)
            times = in_turns({"before": passes(before, x), "after": passes(after, x)}, rounds)
            gains.append(ratio(times["before"], times["after"]))
        total = len(folding.folded) + len(folding.refused)
        lines.append(
            f"| {name} | {len(folding.folded)} of {total} | {folding.difference:.1e} "
            f"| {' | '.join(gains)} | {folding.parameters_saved:,} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="of one pass each, in turns")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = (__doc__ or "").split("\n\n", 2)[2]
    lines = [
        f"# Folding: time before over time after\n\n{machine()}\n\n{about}",
        *rows(args.rounds),
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()

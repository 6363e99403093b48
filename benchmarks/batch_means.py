"""How much a batch's statistics vary, on real data, against the values they are computed from.

    python benchmarks/batch_means.py [--output benchmarks/batch_means.md]

Two networks are given batches of several sizes in training mode: that of examples/digits.py,
trained for some epochs on scikit-learn's handwritten digits, whose images are drawn with
replacement; and a ResNet-18 with random weights, given crops of 64×64 from scikit-learn's two
photographs.
First, of each batch norm's input, the variance of the batches' means over the variance of all
values, averaged over the channels, times the samples of a batch. Were all values independent, it
would be 1 over the positions; were the positions of an image all the same, 1. Then the noise of
the statistics, as rule BN110 measures it, and in brackets what `batchnorm.planning` predicts for
that size from other batches, of 32 samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import TorchNorm, network
from sklearn.datasets import load_digits, load_sample_images
from timing import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import Moments
from batchnorm.audit.noise import noise
from batchnorm.models.norms import batch_norms
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.planning import PlannedLayer
from batchnorm.planning.layers import layers_on

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import ResidualNetwork, train

SHOWN = 32  # samples of the batches that `plan` is given
EPOCHS = 5

Draw = Callable[[int], Tensor]


def digits() -> tuple[nn.Module, Draw]:
    """The network, and what draws images."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labelled = TensorDataset(images, torch.tensor(data.target))
    loader = DataLoader(labelled, batch_size=64, shuffle=True, drop_last=True)
    model = ResidualNetwork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, EPOCHS + 1):
        train(model, loader, optimizer, epoch)
    return model, lambda number: images[torch.randint(len(images), (number,))]


def photographs() -> tuple[nn.Module, Draw]:
    model, _ = network("ResNet-18", TorchNorm)
    loaded = [torch.tensor(each).permute(2, 0, 1) / 255 for each in load_sample_images().images]

    def crop() -> Tensor:
        photo = loaded[int(torch.randint(2, ()))]
        top, left = (int(torch.randint(size - 64, ())) for size in photo.shape[1:])
        return photo[:, top : top + 64, left : left + 64]

    return model, lambda number: torch.stack([crop() for _ in range(number)])


DATA: dict[str, tuple[Callable[[], tuple[nn.Module, Draw]], tuple[int, ...], int]] = {
    "digits": (digits, (2, 4, 8, 16, 32, 64, 128, 256), 400),
    "photographs": (photographs, (2, 4, 8, 16, 32), 200),
}
"""Who makes the network and its images, how large the batches are, and how many of each size."""


def seen(model: nn.Module, given: list[Tensor]) -> dict[str, list[Moments]]:
    """The moments of each layer's inputs, a batch each, in the order of the layers' calls."""
    found: dict[str, list[Moments]] = defaultdict(list)

    def note(path: str) -> Any:
        return lambda _, inputs: found[path].append(Moments.of(inputs[0].double(), (0, 2, 3)))

    hooks = [m.register_forward_pre_hook(note(p)) for p, m in batch_norms(model).items()]
    with left_as_it_was(model), torch.no_grad():
        model.train()
        for batch in given:
            model(batch)
    for hook in hooks:
        hook.remove()
    return found


def varies(moments: list[Moments]) -> float:
    """The variance of the means over that of the values, averaged over the channels."""
    means = torch.stack([m.mean for m in moments])
    return float((means.var(0) / Moments.merge(moments).var()).mean())


def measured(name: str) -> dict[str, Any]:
    make, sizes, number = DATA[name]
    torch.manual_seed(0)
    model, draw = make()
    layers = layers_on(model, [draw(SHOWN) for _ in range(32)], None)
    rows: dict[str, dict[str, Any]] = {
        layer.path: {"positions": layer.positions, "worth": layer.least, "var": {}, "noise": {}}
        for layer in layers
    }
    for size in sizes:
        for path, moments in seen(model, [draw(size) for _ in range(number)]).items():
            own = noise(moments, 1e-5)
            assert own is not None
            rows[path]["var"][str(size)] = varies(moments)
            rows[path]["noise"][str(size)] = own.value
    return rows


def predicted(row: dict[str, Any], size: int) -> float:
    """The noise of so many samples, by what one is worth."""
    return PlannedLayer("", 1, least=row["worth"]).noise(size)


def mean_table(rows: dict[str, Any]) -> list[str]:
    sizes = list(map(int, next(iter(rows.values()))["var"]))
    head = ["layer", "positions", *(f"{n} samples" for n in sizes), "independent", "alike"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path, row in rows.items():
        scaled = [f"{row['var'][str(n)] * n:.3g}" for n in sizes]
        positions = row["positions"]
        cells = [f"`{path}`", f"{positions:.0f}", *scaled, f"{1 / positions:.3g}", "1"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def noise_table(rows: dict[str, Any]) -> list[str]:
    sizes = list(map(int, next(iter(rows.values()))["noise"]))
    head = ["layer", "positions", "a sample is worth", *(f"{n} samples" for n in sizes)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path, row in rows.items():
        both = [f"{row['noise'][str(n)]:.2g} ({predicted(row, n):.2g})" for n in sizes]
        cells = [f"`{path}`", f"{row['positions']:.0f}", f"{row['worth']:.3g}", *both]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text_of(results: dict[str, Any]) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2]
    lines = [f"# Statistics of batches\n\n{results['machine']}\n\n{about}"]
    for name in DATA:
        lines += [f"## {name.capitalize()}: variance of the batches' means, times the samples", ""]
        lines += [*mean_table(results[name]), ""]
        lines += [f"## {name.capitalize()}: noise, and what was predicted", ""]
        lines += [*noise_table(results[name]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, help="write the tables here, and what they are made of as .json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums everywhere
    results = {"machine": machine(), **{name: measured(name) for name in DATA}}
    text = text_of(results)
    print(text)
    if args.output is not None:
        args.output.write_text(text)
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How high may the learning rate go, with batch normalization and without?

Plain convolutional networks learn scikit-learn's digits for six epochs at each learning rate.
The table shows the median test accuracy over the seeds, and the lowest of them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from batchnorm import BatchNorm2d

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
DEPTH, WIDTH, EPOCHS, BATCH = 6, 16, 6, 64

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load() -> Data:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = (images - images.mean()) / images.std()
    x, x_test, y, y_test = train_test_split(
        images, torch.tensor(digits.target), test_size=360, random_state=0
    )
    return x, y, x_test, y_test


def network(normalized: bool) -> nn.Module:
    """`DEPTH` convolutions with ReLU; He initialization, so that it can do without a norm."""
    layers: list[nn.Module] = []
    for i in range(DEPTH):
        conv = nn.Conv2d(WIDTH if i else 1, WIDTH, 3, padding=1, bias=not normalized)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, BatchNorm2d(WIDTH, act="relu") if normalized else nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def accuracy(data: Data, normalized: bool, rate: float, seed: int) -> float:
    """Test accuracy after `EPOCHS` of SGD with momentum; a run that diverges has chance level."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = data
    model = network(normalized)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH)[:-1]:  # the last one is smaller
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)

    data = load()
    table = Table("learning rate", "with batch norm", "without", box=None)
    for rate in track(RATES, "learning rates", transient=True):
        cells = []
        for normalized in (True, False):
            runs = [accuracy(data, normalized, rate, seed) for seed in seeds]
            cells.append(f"{statistics.median(runs):.0%}  ({min(runs):.0%})")
        table.add_row(f"{rate:g}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

"""A residual network with batch normalization learns scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import BatchNorm2d

Loader = DataLoader[tuple[Tensor, ...]]


class Block(nn.Module):
    """Two convolutions beside a shortcut; the second norm adds it and ends in the ReLU."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm2d(c, act="relu")
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm2 = BatchNorm2d(c, act="relu")
        self.shortcut = nn.Identity() if c_in == c else nn.Conv2d(c_in, c, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) → (n, c, h / stride, w / stride)."""
        residual = self.shortcut(x)
        x = self.norm1(self.conv1(x))
        out: Tensor = self.norm2(self.conv2(x), residual=residual)
        return out


class ResidualNetwork(nn.Sequential):
    """8×8 images to ten logits: a stem, three blocks, global average, linear."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            BatchNorm2d(16, act="relu"),
            Block(16, 16, stride=1),
            Block(16, 32, stride=2),
            Block(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def load() -> tuple[TensorDataset, TensorDataset]:
    """1437 images for training and 360 for testing, (n, 1, 8, 8) between 0 and 1, and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    parts = train_test_split(images, torch.tensor(digits.target), test_size=360, random_state=0)
    return TensorDataset(*parts[0::2]), TensorDataset(*parts[1::2])


def train(model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    model.train()
    quiet = not sys.stdout.isatty()
    for images, labels in track(loader, f"epoch {epoch:2}", transient=True, disable=quiet):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def validate(model: nn.Module, loader: Loader, forget_eval: bool) -> float:
    if not forget_eval:
        model.eval()
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return correct / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forget-eval", action="store_true", help="validate in training mode")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_set, test_set = load()
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    test_loader = DataLoader(test_set, batch_size=60)

    model = ResidualNetwork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, args.epochs + 1):
        train(model, train_loader, optimizer, epoch)
        accuracy = validate(model, test_loader, args.forget_eval)
        print(f"epoch {epoch:2}  test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()

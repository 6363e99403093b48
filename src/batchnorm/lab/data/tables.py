"""Tables of measurements: features of tumours, of wines, and of diabetes patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from batchnorm.lab.data.examples import Examples, Split, split

__all__ = ["breast_cancer", "diabetes", "wine"]


def _table(
    load: Callable[[], Any], seed: int, *, validation: int, test: int, standardize: bool
) -> Split:
    loaded = load()
    x = torch.tensor(loaded.data, dtype=torch.float32)
    parts = split(x, torch.tensor(loaded.target), validation=validation, test=test, seed=seed)
    if not standardize:
        return parts
    mean, std = parts.train.x.mean(0), parts.train.x.std(0)

    def standardized(part: Examples) -> Examples:
        return replace(part, x=(part.x - mean) / std)

    return Split(*(standardized(part) for part in (parts.train, parts.validation, parts.test)))


def breast_cancer(seed: int, *, standardize: bool = True) -> Split:
    """569 tumours, 30 features, two classes: 300 to train, 100 and 169.

    Args:
        seed: Draws the parts.
        standardize: By the mean and standard deviation of the training part; raw, the features'
            sizes differ by a factor of 100,000.
    """
    return _table(load_breast_cancer, seed, validation=100, test=169, standardize=standardize)


def wine(seed: int, *, standardize: bool = True) -> Split:
    """178 wines, 13 features, three classes: 90 to train, 40 and 48; see `breast_cancer`."""
    return _table(load_wine, seed, validation=40, test=48, standardize=standardize)


def diabetes(seed: int) -> Split:
    """442 patients, 10 features, the disease's progress a year on: 242 to train, 80 and 120.

    A regression; features and target, a float a patient, are standardized by the training part.
    """
    parts = _table(load_diabetes, seed, validation=80, test=120, standardize=True)
    mean, std = parts.train.y.float().mean(), parts.train.y.float().std()

    def standardized(part: Examples) -> Examples:
        return replace(part, y=((part.y - mean) / std).float())

    return Split(*(standardized(part) for part in (parts.train, parts.validation, parts.test)))

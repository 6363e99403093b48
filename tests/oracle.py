"""What batch normalization is, in float64 NumPy: what every backend is compared with."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Oracle(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray  # biased
    count: np.ndarray
    dx: np.ndarray
    d_weight: np.ndarray
    d_bias: np.ndarray
    d_residual: np.ndarray


def _erf(z):
    return np.vectorize(math.erf)(z) if z.size else z


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _gelu_tanh(z):
    return z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "elu": lambda z: np.where(z > 0, z, np.exp(np.minimum(z, 0)) - 1),
    "silu": lambda z: z * _sigmoid(z),
    "gelu": lambda z: z * (1 + _erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": _gelu_tanh,
    "hardswish": lambda z: z * np.clip(z + 3, 0, 6) / 6,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


def _derivative(act, z):
    """Central differences: independent of any formula for a derivative."""
    h = 1e-6
    return (ACTIVATIONS[act](z + h) - ACTIVATIONS[act](z - h)) / (2 * h)


def batch_norm(
    x, dy, weight=None, bias=None, residual=None, mask=None, eps=1e-5, act="identity", frozen=None
):
    """Forward and backward over (n, c, *positions); `frozen`: a mean and variance to use."""
    x, dy = (np.asarray(a, dtype=np.float64) for a in (x, dy))
    n, c = x.shape[:2]
    weight = np.ones(c) if weight is None else np.asarray(weight, dtype=np.float64)
    bias = np.zeros(c) if bias is None else np.asarray(bias, dtype=np.float64)
    residual = np.zeros_like(x) if residual is None else np.asarray(residual, dtype=np.float64)
    valid = np.ones((n, *x.shape[2:]), dtype=bool) if mask is None else np.asarray(mask)

    rows = np.moveaxis(x, 1, 0)[:, valid]  # (c, values)
    count = rows.shape[1]
    if frozen is None:
        mean, var = rows.mean(1), rows.var(1)
    else:
        mean, var = (np.asarray(a, dtype=np.float64) for a in frozen)
    inverse = 1 / np.sqrt(var + eps)
    normalized = (rows - mean[:, None]) * inverse[:, None]
    z = normalized * weight[:, None] + bias[:, None] + np.moveaxis(residual, 1, 0)[:, valid]
    g = np.moveaxis(dy, 1, 0)[:, valid] * _derivative(act, z)
    if frozen is None:
        centered = (
            g - g.mean(1, keepdims=True) - normalized * (g * normalized).mean(1, keepdims=True)
        )
    else:
        centered = g

    def spread(values):
        full = np.zeros((c, n, *x.shape[2:]))
        full[:, valid] = values
        return np.moveaxis(full, 0, 1)

    return Oracle(
        y=spread(ACTIVATIONS[act](z)),
        mean=mean,
        var=var,
        count=np.full(c, count),
        dx=spread((weight * inverse)[:, None] * centered),
        d_weight=(g * normalized).sum(1),
        d_bias=g.sum(1),
        d_residual=spread(g),
    )

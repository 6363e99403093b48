"""Four primitives and two fusions, and the backends that offer them."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from batchnorm.kernels import cpu, gpu, reference
from batchnorm.kernels.activation import ACTIVATIONS, IDENTITY, Activation
from batchnorm.kernels.contract import (
    NOTHING,
    Backend,
    Coefficients,
    Epilogue,
    Gradients,
    Sums,
    accumulator,
    coefficients_of,
    compute_dtype,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "IDENTITY",
    "NOTHING",
    "Activation",
    "Backend",
    "Coefficients",
    "Epilogue",
    "Gradients",
    "Sums",
    "accumulator",
    "backend_for",
    "coefficients_of",
    "compute_dtype",
]

BACKENDS: list[Backend] = [cast("Backend", cpu), cast("Backend", gpu), cast("Backend", reference)]
"""For each machine the fast one; the last serves everything."""


def backend_for(x: Tensor, epilogue: Epilogue) -> Backend:
    """The first backend that serves x (n, c, *p) with this epilogue."""
    for backend in BACKENDS[:-1]:  # a loop, not a generator: every layer's every call comes by
        if backend.serves(x, epilogue):
            return backend
    return BACKENDS[-1]

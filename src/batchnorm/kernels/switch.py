"""The environment's say in which kernels run: `BATCHNORM_KERNELS`."""

from __future__ import annotations

import os
from functools import cache

__all__ = ["INTERPRETER", "REFERENCE", "VARIABLE", "switched_to"]

VARIABLE = "BATCHNORM_KERNELS"
REFERENCE = "reference"  # PyTorch's operations everywhere
INTERPRETER = "interpreter"  # the GPU's kernels on the CPU, by Triton's interpreter: slow


@cache
def switched_to() -> str | None:
    """What `BATCHNORM_KERNELS` asks for; None where it is not set.

    Raises `ValueError` for a value that there is not.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, REFERENCE, INTERPRETER):
        raise ValueError(
            f"{VARIABLE} must be {REFERENCE}, {INTERPRETER} or not set, got {wanted!r}"
        )
    return wanted

"""Triton's kernels, imported only when the first is asked for, and why there may be none."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from typing import Any

import torch

from batchnorm.kernels.switch import INTERPRETER, VARIABLE, switched_to

__all__ = ["HOMES", "is_interpreted", "kernel", "reason_without", "reason_without_on", "version"]

OLDEST = (3, 2)  # of Triton's compilers that took the kernels
CAPABILITY = (8, 0)  # of NVIDIA's GPUs, that Triton supports

# Triton reads it once, whoever imports it first
if os.environ.get(VARIABLE) == INTERPRETER and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

HOMES = {  # the files of the kernels
    "partial_moments": "moments",
    "merge_moments": "moments",
    "apply": "sweeps",
    "partial_sums": "sweeps",
    "merge_sums": "sweeps",
    "input_gradient": "sweeps",
    "whole_forward": "whole",
    "whole_backward": "whole",
    "track": "tracking",
}


@cache
def reason_without() -> str | None:
    """Why there are no compiled kernels for GPUs here; None where there are.

    Raises `RuntimeError` where they are to be interpreted, and Triton was imported before it knew.
    """
    wanted = switched_to()
    if wanted == INTERPRETER and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}={INTERPRETER} came too late: it must be set before batchnorm is "
            "imported, and that before whatever imports Triton; or set TRITON_INTERPRET=1 too"
        )
    if wanted not in (None, INTERPRETER):
        return f"switched off by BATCHNORM_KERNELS={wanted}"
    try:
        import triton
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed; it comes with PyTorch's GPU builds"
        return f"Triton cannot be imported: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {triton.__version__} is older than {oldest}"
    return None


@cache
def reason_without_on(device: torch.device) -> str | None:
    """Why a GPU has no compiled kernels; None where it has."""
    reason = reason_without()
    if reason is not None or device.type == "cpu" or torch.version.hip is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return f"its compute capability is {have}, and Triton needs {need}"
    return None


@cache
def is_interpreted() -> bool:
    """Whether Triton runs its kernels as Python, on any device."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel("apply"), InterpretedFunction)


@cache
def kernel(name: str) -> Any:
    """A kernel by its name."""
    home = importlib.import_module(f"batchnorm.kernels.gpu.compiled.{HOMES[name]}")
    return getattr(home, name)


def version() -> str:
    """Triton's."""
    import triton

    return str(triton.__version__)

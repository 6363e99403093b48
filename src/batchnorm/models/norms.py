"""Batch norm layers, whoever wrote them, and where they lie in a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

__all__ = ["TorchBatchNorm", "Where", "batch_norms", "is_meant", "replace"]

TorchBatchNorm = nn.modules.batchnorm._BatchNorm
"""What `torch.nn`'s batch norms, this library's and most of other people's have in common."""


def batch_norms(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The batch norm layers of a model by path, each once; "" is the model itself."""
    return {path: m for path, m in model.named_modules() if isinstance(m, TorchBatchNorm)}


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, everywhere in a model where that one lies.

    Raises `ValueError` for the model itself, which has no place.
    """
    if old is model:
        raise ValueError(
            f"the model is itself the {type(old).__name__} to be replaced; put it into a "
            "torch.nn.Sequential"
        )
    parents = list(model.modules())  # not mutated while walked through
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


Where: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which layers: by path, as a pattern such as `"backbone.*"`, or several; by asking; None: all."""


def is_meant(path: str, module: nn.Module, where: Where) -> bool:
    """Whether `where` means the module at `path`."""
    if where is None:
        return True
    if callable(where):
        return bool(where(path, module))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(path, pattern) for pattern in patterns)

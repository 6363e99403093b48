"""Batch norm layers, whoever wrote them, and where they lie in a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.layers import BatchNorm, DomainBatchNorm
from batchnorm.statistics import Sync, Untracked

__all__ = [
    "NUMBERS",
    "TorchBatchNorm",
    "Where",
    "batch_norms",
    "has_usual_forward",
    "is_frozen_norm",
    "is_meant",
    "is_norm",
    "layers_of_domains",
    "replace",
    "sync_of",
]

TorchBatchNorm = nn.modules.batchnorm._BatchNorm
"""What `torch.nn`'s batch norms, this library's and most of other people's have in common."""


def batch_norms(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The batch norm layers of a model by path, each once; "" is the model itself."""
    return {path: m for path, m in model.named_modules() if isinstance(m, TorchBatchNorm)}


def has_usual_forward(module: nn.Module) -> bool:
    """Whether it computes as `torch.nn`'s batch norms or this library's, in no way of its own."""
    return type(module).forward in _USUAL and "forward" not in vars(module)


_USUAL = (TorchBatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)

NUMBERS = ("weight", "bias", "running_mean", "running_var")
"""The tensors by which a batch norm normalizes at inference."""


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Whether it holds what torchvision's, detectron2's and timm's FrozenBatchNorm2d hold.

    That is no parameters, and γ, β, mean and variance as buffers, whatever its name is.
    """
    if module is None or isinstance(module, TorchBatchNorm) or module._parameters:
        return False
    numbers = [module._buffers.get(name) for name in NUMBERS]
    shapes = {None if t is None or is_lazy(t) else tuple(t.shape) for t in numbers}
    return len(shapes) == 1 and len(shapes.pop() or ()) == 1


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a batch norm, or a frozen one, that can be looked into."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return isinstance(module, TorchBatchNorm) or is_frozen_norm(module)


def sync_of(layer: nn.Module) -> Sync | None:
    """How a layer shares statistics with other ranks in training, whoever wrote it; None: not."""
    if isinstance(layer, BatchNorm):
        policy = layer.statistics
        policy = policy.policy if isinstance(policy, Untracked) else policy
        return policy if isinstance(policy, Sync) else None
    if not isinstance(layer, nn.SyncBatchNorm):
        return None
    group = layer.process_group
    is_mine = group is None or isinstance(group, dist.ProcessGroup)  # else it is other ranks'
    return Sync(group) if is_mine else None


def layers_of_domains(model: nn.Module) -> set[nn.Module]:
    """The layers that each normalize one domain: what the model's `DomainBatchNorm`s hold."""
    domains = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    return {layer for domain in domains for layer in domain.modules()}


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

"""Make a layer of `torch.nn` one of this library where it stands, and give it back."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.kernels import IDENTITY
from batchnorm.layers.base import BatchNorm
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.statistics import Batch

__all__ = ["adopt", "is_adoptable", "is_adopted", "release"]

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def is_adoptable(module: nn.Module) -> bool:
    """Whether `adopt` takes a module: `torch.nn`'s own three layers.

    No subclass: its own forward, its methods, and the properties that parametrizations and FSDP
    put on a class of their making would be lost. Nor a SyncBatchNorm, which does not tell how many
    dimensions its input has: `convert` asks an example.
    """
    return type(module) in _OURS


def is_adopted(module: nn.Module) -> bool:
    """Whether a module is `torch.nn`'s by birth."""
    return "_adopted_from" in vars(module)


def adopt(module: nn.Module) -> None:
    """Make a layer of `torch.nn` this library's in place: the same module of another class.

    Parameters, hooks, mode and settings stay the same objects; running statistics in half
    precision become float32, as this library keeps them. See `release`.

    Raises `TypeError` for a module that is not adoptable.
    """
    if not is_adoptable(module):
        raise TypeError(
            "adopt takes torch.nn's BatchNorm1d, BatchNorm2d and BatchNorm3d themselves, got "
            f"{type(module).__name__}, whose own behaviour would be lost"
        )
    before = type(module)
    module.__class__ = _OURS[before]
    assert isinstance(module, BatchNorm)
    module.act, module.statistics, module._thawed = IDENTITY, Batch(), None
    mean = module.running_mean
    vars(module)["_adopted_from"] = (before, None if mean is None else mean.dtype)
    module._keep_statistics_wide()


def release(module: nn.Module) -> None:
    """Undo `adopt`: the class, the attributes, and the precision of the running statistics.

    Raises `ValueError` for a layer that was not adopted, or that was told something since which
    `torch.nn`'s layers cannot do.
    """
    if not isinstance(module, BatchNorm) or not is_adopted(module):
        raise ValueError(f"release undoes adopt, got {type(module).__name__} that was not adopted")
    if module.act != IDENTITY or module.statistics != Batch() or module._thawed is not None:
        raise ValueError(
            f"{module} has an activation or a statistics policy, or is frozen, which torch.nn's "
            "layers cannot express; set act and statistics back, or unfreeze it"
        )
    before, dtype = vars(module).pop("_adopted_from")
    for name in ("act", "statistics", "_thawed"):
        delattr(module, name)
    module.__class__ = before
    weight = module.weight
    if dtype in (torch.float16, torch.bfloat16) and (weight is None or weight.dtype == dtype):
        for name in ("running_mean", "running_var"):
            setattr(module, name, getattr(module, name).to(dtype))

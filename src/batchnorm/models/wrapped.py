"""The model that a user wrote, under what was wrapped around it to run it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.models.compiled import original

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel, DataParallel and `torch.compile`, if any."""
    while True:
        inner = original(model)
        if isinstance(inner, (DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        if inner is model:
            return model
        model = inner

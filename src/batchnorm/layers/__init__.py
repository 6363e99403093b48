"""The layers: drop-in for `torch.nn`'s batch norms, and one for several domains."""

from batchnorm.layers.base import BatchNorm
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.domain import DomainBatchNorm, domain
from batchnorm.layers.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DomainBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "domain",
]

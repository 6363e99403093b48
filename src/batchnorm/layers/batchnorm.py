"""BatchNorm1d, BatchNorm2d and BatchNorm3d: three shape checks over one implementation."""

from __future__ import annotations

from torch import nn

from batchnorm.layers.base import BatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (n, c) or (n, c, length); `BatchNorm` has the arguments."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (n, c, height, width); `BatchNorm` has the arguments."""


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (n, c, depth, height, width); `BatchNorm` has the arguments."""

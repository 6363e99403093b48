"""Batch normalization for PyTorch: drop-in layers, and an auditor that watches them train."""

from batchnorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DomainBatchNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    domain,
)
from batchnorm.moments import Moments
from batchnorm.repair import rematerialize
from batchnorm.statistics import Batch, Ghost, Ramp, Renorm, Running

__all__ = [
    "Batch",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DomainBatchNorm",
    "Ghost",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Ramp",
    "Renorm",
    "Running",
    "domain",
    "rematerialize",
]

__version__ = "0.1.0"

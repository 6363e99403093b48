"""Batch normalization as functions of tensors."""

from batchnorm.functional.checks import is_traced
from batchnorm.functional.normalization import Options, batch_norm, moments, normalize, track

__all__ = ["Options", "batch_norm", "is_traced", "moments", "normalize", "track"]

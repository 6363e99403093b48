"""Batch normalization as functions of tensors."""

from batchnorm.functional.normalization import Options, batch_norm, moments, normalize

__all__ = ["Options", "batch_norm", "moments", "normalize"]

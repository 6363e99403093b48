"""Batch normalization as functions of tensors."""

from batchnorm.functional.checks import is_traced
from batchnorm.functional.normalization import Options, batch_norm, moments, normalize, track
from batchnorm.functional.operation import again, constant
from batchnorm.functional.recipe import Normalization, observe_normalizations
from batchnorm.functional.synchronized import synchronized_batch_norm

__all__ = [
    "Normalization",
    "Options",
    "again",
    "batch_norm",
    "constant",
    "is_traced",
    "moments",
    "normalize",
    "observe_normalizations",
    "synchronized_batch_norm",
    "track",
]

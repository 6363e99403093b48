"""Micro-batches normalized as the one batch that they make."""

from batchnorm.repair.pooling.pooling import pooled_forward

__all__ = ["pooled_forward"]

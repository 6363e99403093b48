"""Running statistics of several ranks, merged."""

from batchnorm.repair.reduction.reduction import Reduction, Spread, reduce_statistics

__all__ = ["Reduction", "Spread", "reduce_statistics"]

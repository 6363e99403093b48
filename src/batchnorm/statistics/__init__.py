"""Statistics policies: whose mean and variance a layer normalizes with while it trains."""

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.policy import RunningStatistics, Statistics
from batchnorm.statistics.renorm import Ramp, Renorm
from batchnorm.statistics.running import Running, Untracked
from batchnorm.statistics.sync import Sync

__all__ = [
    "Batch",
    "Ghost",
    "Ramp",
    "Renorm",
    "Running",
    "RunningStatistics",
    "Statistics",
    "Sync",
    "Untracked",
]

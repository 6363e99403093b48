"""The batch's own statistics: batch norm as published."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from batchnorm.functional import Options, batch_norm
from batchnorm.moments import Moments
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch(Statistics):
    """The mean and variance of the whole mini-batch (Ioffe & Szegedy 2015, algorithm 1)."""

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize by the batch's moments, which the running statistics take up."""
        return batch_norm(x, weight, bias, **options)

"""The running statistics, in training too: the frozen layer, and every layer at inference."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from batchnorm.functional import Options, normalize
from batchnorm.moments import Moments
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Running"]


@dataclass(frozen=True)
class Running(Statistics):
    """The running mean and variance, always, and never updated: `model.train()` or not."""

    needs_running = True

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize by the running statistics, and leave them alone."""
        running = self.required(running)
        return normalize(x, running.mean, running.var, weight, bias, **options), None

    def smallest_slice(self, n: int) -> int:
        """Nobody's: no sample's statistics are computed."""
        return 0

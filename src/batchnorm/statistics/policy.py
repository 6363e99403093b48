"""What a statistics policy is: the answer to "whose mean and variance?"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from batchnorm.functional import Options
from batchnorm.moments import Moments

__all__ = ["RunningStatistics", "Statistics"]


class RunningStatistics(NamedTuple):
    """A layer's buffers: the running mean and (unbiased) variance, and the batches tracked."""

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]
    batches: Int[Tensor, ""] | None


class Statistics(ABC):
    """Whose mean and variance a layer normalizes with while it trains.

    A policy holds settings alone; what it learns lives in the layer's buffers, so policies
    are shared between layers, compared and printed. At inference every layer uses its
    running statistics, whatever its policy.
    """

    needs_running: bool = False
    """Whether the policy reads running statistics, so that a layer must track them."""

    updates: bool = True
    """Whether running statistics take up what it gives."""

    @abstractmethod
    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """y, and the moments that the running statistics take up; None where they do not."""

    def of(self, layer: nn.Module) -> Statistics:
        """The policy as one layer asks it; only who asks other ranks tells them which."""
        return self

    def required(self, running: RunningStatistics | None) -> RunningStatistics:
        """The running statistics, of a policy that cannot do without; `ValueError` for None."""
        if running is None:
            raise ValueError(
                f"{self} reads running statistics, and this layer has none; "
                "construct it with track_running_stats=True"
            )
        return running

    def smallest_slice(self, n: int) -> int:
        """Of n samples, how many share their statistics in the smallest slice; 0: nobody's."""
        return n

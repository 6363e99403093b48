"""Statistics of slices of the batch: the noise of a small batch at the speed of a large one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from batchnorm.functional import Options, batch_norm
from batchnorm.moments import Moments
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Ghost"]


@dataclass(frozen=True)
class Ghost(Statistics):
    """Each slice of `size` samples has its own mean and variance (Hoffer et al. 2017, section 4).

    The slices are normalized in one call; a last slice may be smaller. The running statistics
    take up the slices' moments merged, which are the whole batch's.

    Raises `ValueError` for a size below 2, `TypeError` for one that is no whole number.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int):
            raise TypeError(f"Ghost(size) needs a whole number of samples, got {self.size!r}")
        if self.size < 2:
            raise ValueError(
                f"Ghost(size) needs at least 2 samples in a slice, got {self.size}: one sample "
                "has no batch to be normalized with; for one use torch.nn.InstanceNorm"
            )

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize each slice by its own moments."""
        n = x.shape[0]
        whole = n - n % self.size
        if whole in (0, n):
            y, slices = batch_norm(x, weight, bias, groups=max(whole // self.size, 1), **options)
            return y, _pooled(slices)
        residual, mask = options.get("residual"), options.get("mask")
        parts = []
        for part, groups in ((slice(whole), whole // self.size), (slice(whole, n), 1)):
            options["residual"] = None if residual is None else residual[part]
            options["mask"] = None if mask is None else mask[part]
            y, slices = batch_norm(x[part], weight, bias, groups=groups, **options)
            parts.append((y, _pooled(slices)))
        (first, first_moments), (last, last_moments) = parts
        return torch.cat((first, last)), first_moments + last_moments

    def smallest_slice(self, n: int) -> int:
        """The last slice, where it is smaller."""
        return n % self.size or min(n, self.size)


def _pooled(slices: Moments) -> Moments:
    """(groups, c) → (c,); one group comes as (c,) already."""
    return slices if slices.mean.ndim == 1 else slices.pool(0)

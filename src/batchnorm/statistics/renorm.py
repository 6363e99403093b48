"""Batch renormalization: batch statistics held near the running ones, for small batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from batchnorm.functional import Options, batch_norm, constant, moments
from batchnorm.kernels import compute_dtype
from batchnorm.moments import Moments
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Ramp", "Renorm"]


@dataclass(frozen=True)
class Ramp:
    """A number that goes linearly from `start` to `stop` between batches `begin` and `end`.

    ```python
    Ramp(1, 3, begin=5_000, end=40_000)     # 1 up to batch 5,000, 3 from batch 40,000 on
    ```
    """

    start: float
    stop: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"Ramp needs 0 <= begin < end, got begin={self.begin}, end={self.end}")

    def at(self, batch: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """The value at a batch number, on its device."""
        way = ((batch - self.begin) / (self.end - self.begin)).clamp(0, 1)
        return self.start + (self.stop - self.start) * way


@dataclass(frozen=True)
class Renorm(Statistics):
    """Batch statistics, corrected towards the running ones (Ioffe 2017, algorithm 1).

    y = γ·((x − mean)/σ · r + d) + β, with σ = √(var + ε) of the batch and

    r = clip(σ / σ_running, 1/r_max, r_max),  d = clip((mean − mean_running) / σ_running, ±d_max)

    as constants to autograd, so that a sample's output depends less on its companions and
    training computes nearly what inference will.

    - `r_max` ≥ 1, `d_max` ≥ 0: numbers or `Ramp`s over the layer's count of batches. 1 and 0 is
      plain batch norm, with which training must start. The defaults are the paper's schedule
      (section 4); a run of fewer than 40,000 batches wants a shorter one.

    The paper advises a small momentum (0.01) beside it. The running variance is PyTorch's, the
    unbiased one, so r settles at √((n − 1)/n), not at 1.
    """

    r_max: float | Ramp = Ramp(1.0, 3.0, begin=5_000, end=40_000)
    d_max: float | Ramp = Ramp(0.0, 5.0, begin=5_000, end=25_000)

    needs_running = True

    def __post_init__(self) -> None:
        for name, limit, least in (("r_max", self.r_max, 1), ("d_max", self.d_max, 0)):
            ends = (limit.start, limit.stop) if isinstance(limit, Ramp) else (limit,)
            if min(ends) < least:
                raise ValueError(f"Renorm needs {name} >= {least}, got {limit}")

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize by the batch's moments, then by r and d."""
        running = self.required(running)
        if x.numel() == 0:  # no moments, and nothing to correct
            return batch_norm(x, weight, bias, **options)
        batch = moments(x, mask=options.get("mask"))
        r, d = self.correction(batch, running, options.get("eps", 1e-5))
        dtype = compute_dtype(x)
        r, d = r.to(dtype), d.to(dtype)
        scale = r if weight is None else weight * r
        shift = d if weight is None else weight * d
        if bias is not None:
            shift = shift + bias
        return batch_norm(x, scale, shift, batch=batch, **options)

    def correction(
        self, batch: Moments, running: RunningStatistics, eps: float
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """r and d of each channel."""
        mean, var = (constant(statistic) for statistic in running[:2])
        running_sigma = (var + eps).sqrt()
        r = (batch.var() + eps).sqrt() / running_sigma
        d = (batch.mean - mean) / running_sigma
        r_max, d_max = (_value(limit, running.batches, r) for limit in (self.r_max, self.d_max))
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)


def _value(limit: float | Ramp, batch: Tensor | None, like: Tensor) -> Tensor:
    if isinstance(limit, Ramp):
        if batch is None:
            raise ValueError(
                f"{limit} follows num_batches_tracked, and this layer has none; use a number"
            )
        return limit.at(batch).to(like.dtype)
    return torch.full((), limit, dtype=like.dtype, device=like.device)

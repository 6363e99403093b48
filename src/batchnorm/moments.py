"""Moments: count, mean and summed squared deviation, which merge exactly.

Two `Moments` of disjoint data merge into the `Moments` of all of it, in any order
and without cancellation (Chan, Golub & LeVeque 1979, "Updating formulae and a
pairwise algorithm for computing sample variances", eq. 2.1). One definition serves a
tensor cut into chunks, a batch split over ranks, and a data set split into batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviation of each channel: a monoid under `+`.

    ```python
    batch = Moments.of(x, dims=(0, 2, 3))       # x: (n, c, h, w)   batch.mean: (c,)
    both = batch + Moments.of(more, dims=(0, 2, 3))
    both.var(unbiased=True)                     # (c,)
    Moments.merge(Moments.of(x, dims=(0, 2, 3)) for x in loader).mean
    ```

    All three are tensors, the count too, so that nothing here waits for a device.

    - `count`: how many values were seen, n.
    - `mean`: their mean, Σx / n; 0 where nothing was seen.
    - `m2`: their summed squared deviation, Σ(x − mean)².
    """

    count: Int[Tensor, "*shape"]
    mean: Float[Tensor, "*shape"]
    m2: Float[Tensor, "*shape"]

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "..."],
        dims: int | Sequence[int],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Moments:
        """The moments of `x` over `dims`.

        Two sweeps, the mean and then the deviations from it. Where the sums are no wider than
        the values, the deviations' own mean takes the rounding of the first mean out again.

        - `mask`: broadcasts to `x`; only elements where it is true are counted.
        - `dtype`: of the sums and of the result; float64 for float64 `x`, else float32.

        Raises `ValueError` where `dims` names no dimension: nothing would be summed.
        """
        dtype = dtype or torch.promote_types(x.dtype, torch.float32)
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        if not dims:
            raise ValueError("Moments.of sums over dims, got none; name at least one dimension")
        rounds = dtype.itemsize <= x.dtype.itemsize
        x = x.to(dtype)
        if mask is None:
            values = math.prod(x.shape[d] for d in dims)
            count = torch.full((), values, dtype=torch.int64, device=x.device)
        else:
            mask = mask.expand(x.shape)
            x = x.where(mask, 0)
            count = mask.sum(dims, keepdim=True)
        n = count.clamp(min=1).to(dtype)  # an empty set has mean 0, not 0/0
        mean = x.sum(dims, keepdim=True) / n
        deviation = x - mean
        if mask is not None:
            deviation = deviation.where(mask, 0)
        m2 = deviation.square().sum(dims, keepdim=True)
        if rounds:  # sums wider than the values lose nothing that matters
            rest = deviation.sum(dims, keepdim=True) / n
            mean, m2 = mean + rest, (m2 - rest.square() * n).clamp(min=0)
        return cls(count.expand(mean.shape).squeeze(dims), mean.squeeze(dims), m2.squeeze(dims))

    @classmethod
    def constant(cls, mean: Float[Tensor, "*shape"], var: Float[Tensor, "*shape"]) -> Moments:
        """A mean and a variance that are known, as the moments of one observation."""
        return cls(torch.ones_like(mean, dtype=torch.int64), mean, var)

    @classmethod
    def merge(cls, many: Iterable[Moments]) -> Moments:
        """The moments of all the data behind `many`, which are at least one.

        Raises `ValueError` for an empty `many`: its shape would be unknown.
        """
        many = list(many)
        if not many:
            raise ValueError("Moments.merge needs at least one Moments, got none")
        if len(many) == 1:
            return many[0]
        stacked = cls(
            torch.stack([m.count for m in many]),
            torch.stack([m.mean for m in many]),
            torch.stack([m.m2 for m in many]),
        )
        return stacked.pool(0)

    def pool(self, dim: int) -> Moments:
        """The moments of the data behind all entries along `dim`, merged in one step.

        n = Σnᵢ,  mean = Σnᵢ·meanᵢ / n,  m2 = Σ(m2ᵢ + nᵢ·(meanᵢ − mean)²)
        """
        count = self.count.sum(dim)
        weight = self.count.to(self.mean.dtype)
        n = count.clamp(min=1).to(self.mean.dtype)
        rough = (weight * self.mean).sum(dim) / n
        deviation = self.mean - rough.unsqueeze(dim)
        # weight before the second factor: an empty part has weight 0, and 0 · ∞ is no number
        weighted = weight * deviation
        rest = weighted.sum(dim) / n
        m2 = (self.m2 + weighted * deviation).sum(dim) - rest.square() * n
        return Moments(count, rough + rest, m2.clamp(min=0))

    def __add__(self, other: Moments) -> Moments:
        """The moments of the data behind both (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        share = other.count.to(self.mean.dtype) / count.clamp(min=1)
        difference = other.mean - self.mean
        between = difference * (self.count * share) * difference
        # the larger side's mean is the base, so that an empty side leaves the bits alone
        mean = torch.where(
            share < 0.5,
            self.mean + difference * share,
            other.mean - difference * (1 - share),
        )
        return Moments(count, mean, self.m2 + other.m2 + between)

    def var(self, *, unbiased: bool = False) -> Float[Tensor, "*shape"]:
        """The variance: m2 / n, or m2 / (n − 1) if `unbiased`.

        Where no variance exists (n = 0, or n = 1 and `unbiased`) it is NaN.
        """
        count = self.count - 1 if unbiased else self.count
        nan = torch.full_like(self.m2, math.nan)
        return torch.where(count > 0, self.m2 / count.clamp(min=1), nan)

    def detach(self) -> Moments:
        """The same moments, cut from the autograd graph."""
        return Moments(self.count, self.mean.detach(), self.m2.detach())

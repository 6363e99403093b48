"""A batch norm at inference as y = scale·x + shift, and whether a layer computes that.

All in float64 on the CPU, whatever the model is in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from batchnorm.models.comparison import tolerance

__all__ = ["Affine", "computes"]


@dataclass(frozen=True, eq=False)
class Affine:
    """Channel by channel, y = scale·x + shift."""

    scale: Float64[Tensor, " c"]
    shift: Float64[Tensor, " c"]

    @classmethod
    def of(cls, norm: nn.Module) -> Affine:
        """What a layer with running statistics computes at inference.

        scale = γ/√(var + ε), shift = β − mean·scale
        """
        mean, var = (_wide(getattr(norm, f"running_{name}")) for name in ("mean", "var"))
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        scale = (var + cast("float", norm.eps)).rsqrt()
        if weight is not None:
            scale = scale * _wide(weight)
        shift = -mean * scale
        return cls(scale, shift if bias is None else shift + _wide(bias))

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """y = x."""
        ones = torch.ones(channels, dtype=torch.float64)
        return cls(ones, torch.zeros_like(ones))

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.scale)

    @property
    def is_finite(self) -> bool:
        """Whether every number is."""
        return bool(self.scale.isfinite().all() and self.shift.isfinite().all())

    @property
    def only_scales(self) -> bool:
        """Whether zeros stay zeros."""
        return not self.shift.any()

    def then(self, other: Affine) -> Affine:
        """First this one, then another."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)

    def repeated(self, times: int) -> Affine:
        """For channels that are each so many features, as flattening makes them."""
        return Affine(self.scale.repeat_interleave(times), self.shift.repeat_interleave(times))

    def __call__(self, x: Float[Tensor, "..."], dim: int = 1) -> Float64[Tensor, "..."]:
        """Of a tensor whose channels lie along `dim`."""
        shape = [1] * x.ndim
        shape[dim] = -1
        return _wide(x) * self.scale.view(shape) + self.shift.view(shape)


@torch.no_grad()
def computes(
    norm: nn.Module, rest: Callable[[Tensor], Tensor], like: Float[Tensor, "n c *positions"]
) -> bool:
    """Whether a norm's forward is rest(scale·x + shift), in the mode that it is in.

    It is asked for `like`, and for as many values that it makes large and small, whatever its
    numbers are: where an activation or a clipping shows. For values of ten, and, as rounding may
    hide these where the mean is far from zero, of ten times the shift.
    """
    try:
        affine = Affine.of(norm)
        ramp = torch.linspace(-10, 10, like.numel(), dtype=torch.float64).view(like.shape)
        scale, start = affine.scale.where(affine.scale != 0, 1), -affine.shift
        reaches = (torch.ones_like(scale), 1 + start.abs())
        asked = [Affine(reach / scale, start / scale)(ramp).to(like) for reach in reaches]
        return all(_agrees(norm, rest, affine, x) for x in (like, *asked))
    except Exception:  # a forward of its own may do anything
        return False


def _agrees(norm: nn.Module, rest: Callable[[Tensor], Tensor], affine: Affine, x: Tensor) -> bool:
    y, expected = norm.forward(x.clone()), _wide(rest(affine(x).to(x)))
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    y = _wide(y)
    same = (y == expected) | (y.isnan() & expected.isnan())
    # rounding is relative to what is added up, scale·x, mean·scale and β, which may cancel
    moved = _wide(norm.running_mean) * affine.scale
    terms = Affine(affine.scale.abs(), moved.abs() + (affine.shift + moved).abs())(x.abs())
    bound = tolerance([x]) * (terms + expected.abs())
    return bool((same | ((y - expected).abs() <= bound)).all())


def _wide(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().to("cpu", torch.float64)

"""What a backend offers: four primitives and two fusions over groups × channels.

Every tensor a kernel sees has the shape (n, c, *p): n samples, c channels, any positions *p, in
any strides. Statistics are (c,), or (g, c) where the samples fall into g > 1 equal groups that are
normalized apart (ghost batches); (*g, c) stands for both.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from batchnorm.kernels.activation import IDENTITY, Activation
from batchnorm.moments import Moments

__all__ = [
    "NOTHING",
    "Backend",
    "Coefficients",
    "Epilogue",
    "Gradients",
    "Sums",
    "accumulator",
    "biased",
    "coefficients_of",
    "compute_dtype",
    "groups_of",
]


class Coefficients(NamedTuple):
    """y = (x − center)·scale + shift, each (*g, c).

    The center is taken off before scaling: x·scale + shift' would lose, to rounding of its
    two large terms, as many digits as the mean has more than the spread.
    """

    center: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(
        cls,
        mean: Tensor,  # (*g, c)
        var: Tensor,  # (*g, c)
        weight: Tensor | None,  # (c,)
        bias: Tensor | None,  # (c,)
        eps: float,
        dtype: torch.dtype,
    ) -> Coefficients:
        """scale = γ/√(var + ε) and shift = β, in `dtype`, from statistics of any precision."""
        center = mean.to(dtype)
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight
        # what rounding the mean to `dtype` lost comes back through the shift
        shift = (center - mean) * scale
        if bias is not None:
            shift = shift + bias
        return cls(center, scale.to(dtype), shift.to(dtype))


class Epilogue(NamedTuple):
    """What is fused behind a normalization: y = act(normalized + residual), 0 where masked."""

    residual: Tensor | None = None  # (n, c, *p)
    mask: Tensor | None = None  # (n, 1, *p), bool; true where the data is
    act: Activation = IDENTITY


NOTHING = Epilogue()


class Gradients(NamedTuple):
    """What the backward pass returns; None for an input that is None."""

    x: Tensor  # (n, c, *p)
    residual: Tensor | None  # (n, c, *p)
    weight: Tensor | None  # (c,)
    bias: Tensor | None  # (c,)


class Sums(NamedTuple):
    """Σg and Σg·(x − mean) of each channel, (*g, c), over all that share the mean."""

    total: Tensor
    projection: Tensor

    @classmethod
    def of(
        cls, total: Tensor, about_center: Tensor, coefficients: Coefficients, moments: Moments
    ) -> Sums:
        """From the sums about the center, which is the mean rounded."""
        return cls(total, about_center + (coefficients.center - moments.mean) * total)

    def weight_gradient(self, moments: Moments, eps: float) -> Tensor:
        """γ's, of each group: Σg·(x − mean)/√(var + ε)."""
        return self.projection * torch.rsqrt(biased(moments) + eps)

    def slope_and_offset(
        self, coefficients: Coefficients, moments: Moments, eps: float
    ) -> tuple[Tensor, Tensor]:
        """What `backward_apply` takes: the part of dx that runs through mean and variance.

        dx = s·(g − Σg/n − (x − mean)·Σg(x − mean)/(n·(var + ε))),  s = γ/√(var + ε)
        (Ioffe & Szegedy 2015, section 3).
        """
        n = moments.count.clamp(min=1)
        slope = -self.projection / (biased(moments) + eps) / n
        return slope, (coefficients.center - moments.mean) * slope - self.total / n


@runtime_checkable
class Backend(Protocol):
    """One file with these functions is a backend; see `batchnorm.kernels.reference`."""

    def serves(self, x: Tensor, epilogue: Epilogue) -> bool:
        """Whether this backend computes `x`'s device, dtype, layout and epilogue."""

    def moments(self, x: Tensor, mask: Tensor | None, groups: int) -> Moments:
        """Count, mean and m2 of each channel of each group, in one sweep over x."""

    def apply(self, x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
        """y = act((x − center)·scale + shift + residual), 0 where masked."""

    def backward_reduce(
        self, dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Σg and Σg·(x − center) of each channel, and g itself where there is a residual.

        g is dy taken through the activation, and the residual's gradient.
        """

    def backward_apply(
        self,
        dy: Tensor,
        x: Tensor,
        coefficients: Coefficients,
        epilogue: Epilogue,
        slope: Tensor,
        offset: Tensor,
    ) -> Tensor:
        """dx = scale·(g + (x − center)·slope + offset).

        Where there was a residual, `backward_reduce` gave g: it comes as dy, without epilogue.
        The scale stands outside: where it is 1e-30 its product with the slope would be 0.
        """

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        epilogue: Epilogue,
        groups: int,
        given: Moments | None,
    ) -> tuple[Tensor, Moments]:
        """`moments` and `apply` in one, where nobody has to be asked in between.

        `given`: the moments where they are known, x's own or constants.
        """

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Moments,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        epilogue: Epilogue,
        *,
        frozen: bool,
        affine: bool,
    ) -> Gradients:
        """`backward_reduce` and `backward_apply` in one.

        `frozen`: the moments are constants. `affine`: γ's and β's gradients are asked for.
        """

    def track(
        self,
        mean: Tensor,
        var: Tensor,
        batches: Tensor | None,
        batch: Moments,
        momentum: float | None,
    ) -> None:
        """Move running statistics (c,) in place towards a batch's; `batches` counts it.

        A batch with a mean or variance that is not finite is skipped whole.
        """


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float64, but on a device that has none float32."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of elementwise arithmetic on x: its own, but float32 for half precision."""
    return x.dtype if x.dtype.itemsize >= 4 else torch.float32


def groups_of(statistic: Tensor) -> int:
    """Into how many groups the samples fall, by the shape of a statistic (*g, c)."""
    return 1 if statistic.ndim == 1 else statistic.shape[0]


def biased(moments: Moments) -> Tensor:
    """The variance m2 / n that normalizes; 0 for an empty set, whose outputs nobody reads."""
    return moments.m2 / moments.count.clamp(min=1)


def coefficients_of(
    x: Tensor, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Coefficients:
    """The coefficients that standardize x (n, c, *p) with moments (*g, c)."""
    mean, var = (statistic.to(accumulator(x)) for statistic in (moments.mean, biased(moments)))
    return Coefficients.of(mean, var, weight, bias, eps, compute_dtype(x))

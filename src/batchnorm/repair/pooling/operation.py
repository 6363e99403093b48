"""Several batches normalized as the one that they make: one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import Normalization, again, moments
from batchnorm.functional.operation import epilogue_of
from batchnorm.functional.recipe import Settings
from batchnorm.kernels import Activation, Coefficients, Epilogue, backend_for, coefficients_of
from batchnorm.kernels.contract import biased
from batchnorm.moments import Moments

__all__ = ["Part", "normalize_together"]


class Part(NamedTuple):
    """One of the batches, and what belongs to it."""

    x: Tensor  # (nᵢ, c, *pᵢ)
    residual: Tensor | None = None  # (nᵢ, c, *pᵢ)
    mask: Tensor | None = None  # (nᵢ, *pᵢ), bool


def normalize_together(
    parts: Sequence[Part], weight: Tensor | None, bias: Tensor | None, eps: float, act: Activation
) -> tuple[Sequence[Tensor], Sequence[Normalization]]:
    """yᵢ = act(γ·(xᵢ − mean)/√(var + ε) + β + residualᵢ), with all parts' mean and variance.

    The gradients run through the mean and the variance to all parts. Returns the outputs, and
    how each was computed.
    """
    pooled = Moments.merge(moments(part.x.detach(), mask=part.mask) for part in parts)
    settings = Settings(False, 1, eps, act.name, act.parameter)
    how = [Normalization(pooled, settings, *part, weight, bias) for part in parts]
    xs, residuals, _ = zip(*parts, strict=True)
    outputs: tuple[Tensor, ...] = _apply(how, weight, bias, *xs, *residuals)
    return outputs, how


class _Together(torch.autograd.Function):
    """One node for all parts, which autograd reaches when all outputs' gradients are there."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Sequence[Normalization],
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        pooled, ctx.settings = how[0].moments, how[0].settings
        ctx.residual_dtypes = [None if n.residual is None else n.residual.dtype for n in how]
        # only the derivative of an activation asks for the residual again
        kept = [None if ctx.settings.act == "identity" else n.residual for n in how]
        ctx.save_for_backward(
            weight, bias, pooled.count, pooled.mean, pooled.m2,
            *(n.x for n in how), *kept, *(n.mask for n in how),
        )  # fmt: skip
        return tuple(again(n) for n in how)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        """Sums over all parts, then each part's gradient: `kernels.reference.backward`, cut."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pooled_forward is differentiated once, and create_graph=True asks for more; for "
                "second derivatives call the model with one batch"
            )
        weight, bias, *rest = ctx.saved_tensors
        pooled, xs, residuals, masks = Moments(*rest[:3]), *_in_three(rest[3:])
        _, _, eps, act, parameter = ctx.settings
        coefficients = coefficients_of(xs[0], pooled, weight, bias, eps)
        epilogues = [
            epilogue_of(r, m, act, parameter) for r, m in zip(residuals, masks, strict=True)
        ]
        sums = [
            backend_for(x, epilogue).backward_reduce(dy, x, coefficients, epilogue)
            for dy, x, epilogue in zip(dys, xs, epilogues, strict=True)
        ]
        totals, projections, gs = zip(*sums, strict=True)
        total = torch.stack(totals).sum(0)
        rounded = coefficients.center - pooled.mean  # the sums are about the rounded center
        projection = torch.stack(projections).sum(0) + rounded * total
        inverse = torch.rsqrt(biased(pooled) + eps)
        n = pooled.count.clamp(min=1)
        slope = -inverse.square() * projection / n
        offset = -total / n + rounded * slope
        asked = ctx.needs_input_grad[3 : 3 + len(xs)]
        dxs = [
            _input_gradient(dy, x, g, epilogue, coefficients, slope, offset) if needed else None
            for needed, dy, x, g, epilogue in zip(asked, dys, xs, gs, epilogues, strict=True)
        ]
        d_residuals = [
            _residual_gradient(*of) for of in zip(dys, gs, masks, ctx.residual_dtypes, strict=True)
        ]
        d_weight = None if weight is None else (projection * inverse).to(weight.dtype)
        d_bias = None if bias is None else total.to(bias.dtype)
        return None, d_weight, d_bias, *dxs, *d_residuals


_apply: Any = _Together.apply


def _in_three(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    k = len(tensors) // 3
    return tensors[:k], tensors[k : 2 * k], tensors[2 * k :]


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    g: Tensor | None,
    epilogue: Epilogue,
    coefficients: Coefficients,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """That of x; `g`, where there was a residual, is dy taken through the activation."""
    if g is not None:
        dy, epilogue = g, Epilogue(mask=epilogue.mask)
    backend = backend_for(x, epilogue)
    return backend.backward_apply(dy, x, coefficients, epilogue, slope, offset)


def _residual_gradient(
    dy: Tensor, g: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """That of `dtype`'s residual; dy itself where nothing but the mask came after it."""
    if dtype is None or g is not None:
        return g
    return (dy if mask is None else dy.where(mask.unsqueeze(1), 0)).to(dtype)

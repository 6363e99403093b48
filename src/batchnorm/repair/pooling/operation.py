"""Several batches normalized as the one that they make: one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import Normalization, again, moments
from batchnorm.functional.halves import input_gradient, residual_gradient, sums_of
from batchnorm.functional.recipe import Settings
from batchnorm.kernels import Activation, Sums
from batchnorm.moments import Moments
from batchnorm.ranks import Peers, SyncError, step

__all__ = ["Part", "normalize_together"]


class Part(NamedTuple):
    """One of the batches, and what belongs to it."""

    x: Tensor  # (nᵢ, c, *pᵢ)
    residual: Tensor | None = None  # (nᵢ, c, *pᵢ)
    mask: Tensor | None = None  # (nᵢ, *pᵢ), bool


def normalize_together(
    parts: Sequence[Part],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
    peers: Peers | None = None,
) -> tuple[Sequence[Tensor], Sequence[Normalization]]:
    """yᵢ = act(γ·(xᵢ − mean)/√(var + ε) + β + residualᵢ), with all parts' mean and variance.

    The gradients run through the mean and the variance to all parts. Returns the outputs, and
    how each was computed.

    - `peers`: the ranks whose parts are meant too; None: those of this one.
    """
    pooled = Moments.merge(moments(part.x.detach(), mask=part.mask) for part in parts)
    if peers is not None:
        pooled = peers.merged(pooled)
    settings = Settings(False, 1, eps, act.name, act.parameter)
    how = [Normalization(pooled, settings, *part, weight, bias) for part in parts]
    xs, residuals, _ = zip(*parts, strict=True)
    outputs: tuple[Tensor, ...] = _apply(how, peers, weight, bias, *xs, *residuals)
    return outputs, how


class _Together(torch.autograd.Function):
    """One node for all parts, which autograd reaches when all outputs' gradients are there."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Sequence[Normalization],
        peers: Peers | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        pooled, ctx.settings, ctx.peers = how[0].moments, how[0].settings, peers
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
        """Sums over all parts, then each part's gradient."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pooled_forward is differentiated once, and create_graph=True asks for more; for "
                "second derivatives call the model with one batch"
            )
        weight, bias, *rest = ctx.saved_tensors
        pooled, (xs, residuals, masks) = Moments(*rest[:3]), _in_three(rest[3:])
        parts = zip(xs, residuals, masks, strict=True)
        how = [Normalization(pooled, ctx.settings, *part, weight, bias) for part in parts]
        sums, gs = zip(*(sums_of(dy, n) for dy, n in zip(dys, how, strict=True)), strict=True)
        mine = Sums(*(torch.stack(each).sum(0) for each in zip(*sums, strict=True)))
        everybody = mine if ctx.peers is None else _total(mine, ctx.peers)
        asked = ctx.needs_input_grad[4 : 4 + len(xs)]
        dxs = [
            input_gradient(dy, g, n, everybody) if needed else None
            for needed, dy, g, n in zip(asked, dys, gs, how, strict=True)
        ]
        d_residuals = [
            residual_gradient(*of) for of in zip(dys, gs, masks, ctx.residual_dtypes, strict=True)
        ]
        d_weight = d_bias = None
        if weight is not None:
            d_weight = mine.weight_gradient(pooled, ctx.settings.eps).to(weight.dtype)
        if bias is not None:
            d_bias = mine.total.to(bias.dtype)
        return None, None, d_weight, d_bias, *dxs, *d_residuals


_apply: Any = _Together.apply


def _in_three(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    k = len(tensors) // 3
    return tensors[:k], tensors[k : 2 * k], tensors[2 * k :]


def _total(mine: Sums, peers: Peers) -> Sums:
    """The sums over all ranks.

    Autograd's order depends on how many nodes each thread has made, which may differ between
    ranks: so the layer's tag goes with the sums, and Σt² = (Σt)²/ranks only where all are alike.
    """
    tags = [mine.total.new_full((1,), peers.caller.tag**power) for power in (1, 2, 0)]
    total = peers.total(torch.cat((*mine, *tags)))
    of_tags, of_squares, ranks = total[-3:]
    differs = of_tags.square() != of_squares * ranks
    if total.device.type == "cpu":
        if differs:
            step.undo()
            raise SyncError(
                f"the ranks went backward through pooled_forward in different orders, at "
                f"{peers.caller.name} this one; let all have as many micro-batches"
            )
    else:  # to look would wait for the device
        total = total.masked_fill(differs, torch.nan)
    return Sums(*total[:-3].split(len(mine.total)))

"""Batch normalization over several ranks: one collective between the two halves of each pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from batchnorm.functional import composite, operation
from batchnorm.functional.checks import check_input
from batchnorm.functional.halves import input_gradient, residual_gradient, sums_of
from batchnorm.functional.recipe import Normalization, Settings, observer
from batchnorm.kernels import Activation, Sums, reference
from batchnorm.moments import Moments
from batchnorm.ranks import GraphPeers, Peers

__all__ = ["synchronized_batch_norm"]


def synchronized_batch_norm(
    x: Float[Tensor, "n c *positions"],
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    *,
    peers: Peers | GraphPeers,
    residual: Float[Tensor, "n c *positions"] | None = None,
    mask: Bool[Tensor, "n *positions"] | None = None,
    eps: float = 1e-5,
    act: str | nn.Module | Activation | None = None,
) -> tuple[Float[Tensor, "n c *positions"], Moments]:
    """Normalize each channel by the moments of all ranks' batches.

    y = act(γ·(x − mean)/√(var + ε) + β + residual), with the mean and the biased variance of the
    batches of all ranks as one. n may differ between ranks, and be 0. Gradients run through
    mean and variance to all ranks; those of γ and β are this rank's, whose sum over the ranks is
    that of one process.

    One collective forward, of 2c + 1 numbers, and one backward, of 2c. All ranks of the group
    must call this, and go backward, in the same order; that another layer of c channels goes
    backward is not noticed. For second derivatives x needs gradients on all ranks or on none.

    - `peers`: the ranks, `batchnorm.ranks.Peers(group)`.
    - Other arguments and errors are those of `batch_norm`.

    Returns y, in x's layout, and the moments of all ranks' batches, the same bits on each.

    Raises `SyncError` where a rank does not come, `RuntimeError` inside of a transform of
    torch.func, an exporter or a tracer.

    Source: Ioffe & Szegedy 2015, "Batch normalization", algorithm 1; Chan, Golub & LeVeque 1979,
    eq. 2.1, for the moments.
    """
    activation = Activation.of(act)
    check_input(x, weight=weight, bias=bias, residual=residual, mask=mask)
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if composite.is_asked_for():
        raise RuntimeError(
            "statistics that ranks share cannot be computed inside a transform of torch.func, an "
            "exporter or a tracer, which do not know of other processes; call eval(), or use "
            "statistics=Batch() there"
        )
    settings = Settings(False, 1, eps, activation.name, activation.parameter)
    if isinstance(peers, GraphPeers):
        pooled = peers.merged(operation.moments(x.detach(), mask, 1))
        three = pooled.count, pooled.mean, pooled.m2
        y = torch.ops.batchnorm.synchronized(
            x, residual, mask, weight, bias, *three, *settings, *peers
        )
        return y, pooled
    used: list[Moments] = []
    y = _record(x, residual, weight, bias, mask, settings, peers, used)
    if observer.notify is not None and y.requires_grad:
        observer.notify(y, Normalization(used[0], settings, x, residual, mask, weight, bias))
    return y, used[0]


class _Synchronized(torch.autograd.Function):
    """The operation in eager mode; the moments leave by a list, as constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: Settings,
        peers: Peers,
        used: list[Moments],
    ) -> Tensor:
        pooled = peers.merged(operation.moments(x, mask, 1))
        used.append(pooled)
        _keep(ctx, Normalization(pooled, settings, x, residual, mask, weight, bias), peers)
        return operation.normalize(x, residual, mask, weight, bias, pooled, settings)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy), None, None, None, None


_record: Any = _Synchronized.apply


def _keep(ctx: Any, how: Normalization, peers: Peers | GraphPeers) -> None:
    """Save what the backward pass asks for."""
    ctx.settings, ctx.peers = how.settings, peers
    ctx.residual_dtype = None if how.residual is None else how.residual.dtype
    # only the derivative of an activation asks for the residual again
    kept = None if how.settings.act == "identity" else how.residual
    m = how.moments
    ctx.save_for_backward(how.x, kept, how.mask, how.weight, how.bias, m.count, m.mean, m.m2)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Those of x, residual, weight and bias: sums, everybody's sums, and each one's own part."""
    x, residual, mask, weight, bias, *moments = ctx.saved_tensors
    peers, pooled = ctx.peers, Moments(*moments)
    if torch.is_grad_enabled():  # as functions of x, for second derivatives run through them too
        pooled = _merged(x, mask, peers)
    how = Normalization(pooled, ctx.settings, x, residual, mask, weight, bias)
    mine, g = sums_of(dy, how)
    total = _total(torch.cat(mine), peers)
    everybody = Sums(*total.split(total.shape[0] // 2))
    dx = input_gradient(dy, g, how, everybody)
    d_residual = residual_gradient(dy, g, mask, ctx.residual_dtype)
    d_weight = d_bias = None
    if weight is not None:
        d_weight = mine.weight_gradient(pooled, ctx.settings.eps).to(weight.dtype)
    if bias is not None:
        d_bias = mine.total.to(bias.dtype)
    return dx, d_residual, d_weight, d_bias


def _merged(x: Tensor, mask: Tensor | None, peers: Peers) -> Moments:
    """The pooled moments by sums that autograd can follow again."""
    mine = reference.moments(x, None if mask is None else mask.unsqueeze(1))
    weight = mine.count.to(mine.mean.dtype)
    n, s = _total(torch.cat((weight, weight * mine.mean)), peers).split(x.shape[1])
    n = n.clamp(min=1)
    between = weight * (mine.mean - s / n).square()
    return Moments(n.to(torch.int64), s / n, _total(mine.m2 + between, peers))


def _total(sums: Tensor, peers: Peers | GraphPeers) -> Tensor:
    """The sum over ranks; differentiable where autograd records."""
    if torch.is_grad_enabled() and sums.requires_grad:
        total: Tensor = _differentiable_total(sums, peers)
        return total
    return peers.total(sums)


class _Total(torch.autograd.Function):
    """A sum over ranks: each rank's numbers go into all of its copies."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.total(sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _total(gradient.contiguous(), ctx.peers), None


_differentiable_total: Any = _Total.apply


@torch.library.custom_op(
    "batchnorm::synchronized",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor count, "
        "Tensor mean, Tensor m2, bool frozen, int groups, float eps, str act, float parameter, "
        "str name, int size, int rank) -> Tensor"
    ),
)
def _registered(*arguments: Any) -> Tensor:
    """Its forward half, with the moments that all ranks' batches have; the backward pass asks."""
    x, residual, mask, weight, bias, *moments = arguments[:8]
    settings = Settings(*arguments[8:13])
    return operation.normalize(x, residual, mask, weight, bias, Moments(*moments), settings)[0]


@_registered.register_fake
def _(x: Tensor, residual: Tensor | None, *_: Any) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=dtype)


def _keep_registered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, mask, weight, bias, *moments = inputs[:8]
    settings, peers = Settings(*inputs[8:13]), GraphPeers(*inputs[13:])
    how = Normalization(Moments(*moments), settings, x, residual, mask, weight, bias)
    _keep(ctx, how, peers)


def _backward_registered(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_residual, d_weight, d_bias = _gradients(ctx, dy)
    return dx, d_residual, None, d_weight, d_bias, *(None,) * 11


_registered.register_autograd(_backward_registered, setup_context=_keep_registered)

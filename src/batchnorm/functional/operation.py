"""The differentiable operation, registered with PyTorch: what compilers and autograd see.

Tensors here are (n, c, *p) and masks (n, *p); `groups` cuts n into slices that are normalized
apart, and statistics are (groups, c). Each operation is opaque to a compiler, has a fake for
shapes, and hands its work to the backend that serves its input. The moments come in as x's own
or, where `frozen`, as constants; None asks for x's own to be computed on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import (
    Activation,
    Epilogue,
    accumulator,
    backend_for,
    coefficients_of,
    reference,
)
from batchnorm.moments import Moments

__all__ = ["batch_norm", "batch_norm_backward", "epilogue_of", "grouped", "moments"]

_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? count, "
    "Tensor? mean, Tensor? m2, bool frozen, int groups, float eps, str act, float parameter"
)


def grouped(x: Tensor, groups: int) -> Tensor:
    """(n, …) seen as (groups, n / groups, …), without a copy."""
    return x.view(groups, x.shape[0] // groups, *x.shape[1:])


def epilogue_of(
    residual: Tensor | None, mask: Tensor | None, groups: int, act: str, parameter: float
) -> Epilogue:
    """The kernels' epilogue from an operation's flat arguments."""
    return Epilogue(
        None if residual is None else grouped(residual, groups),
        None if mask is None else grouped(mask.unsqueeze(1), groups),
        Activation(act, parameter),
    )


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """y (groups, n / groups, …) as x's shape, in the strides that `torch.empty_like(x)` has.

    Those are what the fakes promise. The result is no view of y: autograd forbids to modify a
    view in place that an operation returned, and people put `ReLU(inplace=True)` behind a norm.
    """
    out = torch.empty_like(x, dtype=y.dtype)
    y = y.flatten(0, 1)
    if y.stride() != out.stride():
        return out.copy_(y)
    flat: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return flat


@torch.library.custom_op(
    "batchnorm::moments",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, int groups) -> (Tensor, Tensor, Tensor)",
)
def moments(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and m2 of each group and channel; not differentiable."""
    epilogue = epilogue_of(None, mask, groups, "identity", 0.0)
    view = grouped(x, groups)
    batch = backend_for(view, epilogue).moments(view, epilogue.mask)
    return batch.count.contiguous(), batch.mean, batch.m2


@moments.register_fake
def _(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((groups, x.shape[1]), dtype=accumulator(x))
    return torch.empty_like(mean, dtype=torch.int64), mean, torch.empty_like(mean)


@torch.library.custom_op(
    "batchnorm::batch_norm",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    frozen: bool,
    groups: int,
    eps: float,
    act: str,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the moments that were computed on the way; empty tensors where they were given."""
    epilogue = epilogue_of(residual, mask, groups, act, parameter)
    view = grouped(x, groups)
    backend = backend_for(view, epilogue)
    if count is None or mean is None or m2 is None:
        y, batch = backend.forward(view, weight, bias, eps, epilogue)
        return _laid_out_like(x, y), batch.count.contiguous(), batch.mean, batch.m2
    given = Moments(count, mean, m2)
    y = backend.apply(view, coefficients_of(view, given, weight, bias, eps), epilogue)
    return _laid_out_like(x, y), x.new_empty(0), x.new_empty(0), x.new_empty(0)


@batch_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    frozen: bool,
    groups: int,
    *_: object,
) -> tuple[Tensor, ...]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=dtype)
    if mean is not None:
        return y, *(x.new_empty(0) for _ in range(3))
    return y, *torch.ops.batchnorm.moments(x, mask, groups)


@torch.library.custom_op(
    "batchnorm::batch_norm_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    frozen: bool,
    groups: int,
    eps: float,
    act: str,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight and bias; empty tensors where there is none."""
    epilogue = epilogue_of(residual, mask, groups, act, parameter)
    view = grouped(x, groups)
    gradients = backend_for(view, epilogue).backward(
        grouped(dy, groups),
        view,
        Moments(count, mean, m2),
        weight,
        bias,
        eps,
        epilogue,
        frozen=frozen,
    )
    d_residual = gradients.residual
    return (
        _laid_out_like(x, gradients.x),
        x.new_empty(0)
        if residual is None or d_residual is None
        else _laid_out_like(residual, d_residual),
        x.new_empty(0) if gradients.weight is None else gradients.weight,
        x.new_empty(0) if gradients.bias is None else gradients.bias,
    )


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    inputs = (x, residual, weight, bias)
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in inputs)


def _keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    x, residual, mask, weight, bias, *given = inputs[:8]
    ctx.frozen, ctx.groups, ctx.eps, ctx.act, ctx.parameter = inputs[8:]
    ctx.residual_dtype = None if residual is None else residual.dtype
    moments = output[1:] if given[0] is None else given
    # only the derivative of an activation asks for the residual again
    kept = None if ctx.act == "identity" else residual
    ctx.save_for_backward(x, kept, mask, weight, bias, *moments)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, mask, weight, bias, *moments = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(ctx, dy)
    else:
        gradients = torch.ops.batchnorm.batch_norm_backward(
            dy, x, residual, mask, weight, bias, *moments,
            ctx.frozen, ctx.groups, ctx.eps, ctx.act, ctx.parameter,
        )  # fmt: skip
    dx, d_residual, d_weight, d_bias = gradients
    if ctx.residual_dtype is not None and residual is None:
        d_residual = dy if mask is None else dy.where(mask.unsqueeze(1), 0)
        d_residual = d_residual.to(ctx.residual_dtype)
    elif residual is None:
        d_residual = None
    return (
        dx,
        d_residual,
        None,
        None if weight is None else d_weight,
        None if bias is None else d_bias,
        *(None,) * 8,
    )


batch_norm.register_autograd(_backward, setup_context=_keep_for_backward)


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the reference's plain operations, which autograd can follow again."""
    x, residual, mask, weight, bias, *moments = ctx.saved_tensors
    epilogue = epilogue_of(residual, mask, ctx.groups, ctx.act, ctx.parameter)
    view = grouped(x, ctx.groups)
    gradients = reference.backward(
        grouped(dy, ctx.groups),
        view,
        # as a function of x, for the second derivative runs through the statistics too
        Moments(*moments) if ctx.frozen else reference.moments(view, epilogue.mask),
        weight,
        bias,
        ctx.eps,
        epilogue,
        frozen=ctx.frozen,
    )
    d_residual = gradients.residual
    return (
        gradients.x.flatten(0, 1),
        None if d_residual is None else d_residual.flatten(0, 1),
        gradients.weight,
        gradients.bias,
    )

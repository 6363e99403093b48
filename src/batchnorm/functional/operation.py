"""The differentiable operation: to PyTorch's compilers a registered one, in eager mode a function.

Tensors here are (n, c, *p) and masks (n, *p); `groups` cuts n into slices that are normalized
apart, and statistics are (groups, c). The moments come in as x's own or, where `frozen`, as
constants; None asks for x's own to be computed on the way. The work is done by the backend that
serves the input. The registered operations are opaque to a compiler and have fakes for shapes;
plain tensors in eager mode are spared their dispatch, which costs more than a small tensor does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional.recipe import Normalization, observer
from batchnorm.kernels import Activation, Epilogue, accumulator, backend_for, reference
from batchnorm.moments import Moments

__all__ = ["again", "epilogue_of", "is_plain", "moments", "normalize"]

_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? count, "
    "Tensor? mean, Tensor? m2, bool frozen, int groups, float eps, str act, float parameter"
)


def normalize(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the moments computed on the way; the arguments are those of `_ARGUMENTS`."""
    if not is_plain(arguments[:5]):
        registered: tuple[Tensor, Tensor, Tensor, Tensor]
        registered = torch.ops.batchnorm.batch_norm(*arguments)
        return registered
    if torch.is_grad_enabled():
        computed: list[Tensor] = []
        y: Tensor = _record(computed, *arguments)
        if observer.notify is not None and y.requires_grad:
            moments = computed if arguments[5] is None else arguments[5:8]
            observer.notify(y, Normalization(*arguments[:5], *moments, *arguments[8:]))
        return y, computed[0], computed[1], computed[2]
    return _forward(*arguments)


def moments(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and m2 of each group and channel; not differentiable."""
    if is_plain((x, mask)):
        return _moments(x, mask, groups)
    registered: tuple[Tensor, Tensor, Tensor] = torch.ops.batchnorm.moments(x, mask, groups)
    return registered


def again(normalization: Normalization) -> Tensor:
    """The same y to the same bits, for autograd a constant."""
    n = normalization
    assert n.x is not None
    with torch.no_grad():
        y, *_ = _forward(
            n.x, n.residual, n.mask, n.weight, n.bias, n.count, n.mean, n.m2,
            n.frozen, n.groups, n.eps, n.act, n.parameter,
        )  # fmt: skip
    return y


def epilogue_of(
    residual: Tensor | None, mask: Tensor | None, act: str, parameter: float
) -> Epilogue:
    """The kernels' epilogue from an operation's flat arguments."""
    mask = None if mask is None else mask.unsqueeze(1)
    return Epilogue(residual, mask, _activation(act, parameter))


_activation = lru_cache(Activation)  # a call of it would cost as much as a launch


def is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether nobody looks on: no compiler, no dispatch mode, no subclass of tensors."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(t is None or type(t) is Tensor or type(t) is nn.Parameter for t in tensors)
    )


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """y in the strides that `torch.empty_like(x)` has, which the fakes promise, and no view.

    Autograd forbids to modify a view in place that an operation returned, and people put
    `ReLU(inplace=True)` behind a norm.
    """
    strides = y.stride()
    if strides != x.stride():
        out = torch.empty_like(x, dtype=y.dtype)
        if strides != out.stride():
            return out.copy_(y)
    if not y._is_view():
        return y
    flat: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return flat


def _moments(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    epilogue = epilogue_of(None, mask, "identity", 0.0)
    batch = backend_for(x, epilogue).moments(x, epilogue.mask, groups)
    return batch.count, batch.mean, batch.m2


def _forward(
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
    epilogue = epilogue_of(residual, mask, act, parameter)
    backend = backend_for(x, epilogue)
    given = None
    if count is not None and mean is not None and m2 is not None:
        given = Moments(count, mean, m2)
    y, batch = backend.forward(x, weight, bias, eps, epilogue, groups, given)
    y = _laid_out_like(x, y)
    if given is None:
        return y, batch.count, batch.mean, batch.m2
    return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)


def _gradients(
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
    affine: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias."""
    epilogue = epilogue_of(residual, mask, act, parameter)
    dx, d_residual, d_weight, d_bias = backend_for(x, epilogue).backward(
        dy, x, Moments(count, mean, m2), weight, bias, eps, epilogue, frozen=frozen, affine=affine
    )
    dx = _laid_out_like(x, dx)
    if residual is not None and d_residual is not None:
        d_residual = _laid_out_like(residual, d_residual)
    return dx, d_residual, d_weight, d_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, mask, weight, bias, *given = inputs[:8]
    ctx.settings = inputs[8:]
    ctx.residual_dtype = None if residual is None else residual.dtype
    moments = output[1:] if given[0] is None else given
    # only the derivative of an activation asks for the residual again
    kept = None if ctx.settings[3] == "identity" else residual
    ctx.save_for_backward(x, kept, mask, weight, bias, *moments)


def _differentiated(
    ctx: Any, dy: Tensor, learns_weight: bool, learns_bias: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments."""
    saved = ctx.saved_tensors
    x, residual, mask, weight, bias = saved[:5]
    affine = learns_weight or learns_bias
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(ctx, dy)
    elif is_plain((dy, x, residual, weight, bias)):
        gradients = _gradients(*(dy, *saved, *ctx.settings, affine))
    else:
        registered = torch.ops.batchnorm.batch_norm_backward
        gradients = registered(dy, *saved, *ctx.settings, affine)
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
        d_weight if affine and weight is not None else None,
        d_bias if affine and bias is not None else None,
        *(None,) * 8,
    )


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the reference's plain operations, which autograd can follow again."""
    x, residual, mask, weight, bias, *moments = ctx.saved_tensors
    frozen, groups, eps, act, parameter = ctx.settings
    epilogue = epilogue_of(residual, mask, act, parameter)
    # as a function of x, for the second derivative runs through the statistics too
    batch = Moments(*moments) if frozen else reference.moments(x, epilogue.mask, groups)
    return tuple(reference.backward(dy, x, batch, weight, bias, eps, epilogue, frozen=frozen))


class _BatchNorm(torch.autograd.Function):
    """The same in eager mode, where what autograd does for each output costs more than a kernel.

    So the moments leave by a list. (And a `setup_context` would cost more than all the rest.)
    """

    @staticmethod
    def forward(ctx: Any, computed: list[Tensor], *arguments: Any) -> Tensor:
        output = _forward(*arguments)
        computed.extend(output[1:])
        _keep(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_differentiated(ctx, dy, *ctx.needs_input_grad[4:6])


# past a wrapper that looks for torch.func's transforms, which get the composite form
_record: Any = super(torch.autograd.Function, _BatchNorm).apply


_registered_moments = torch.library.custom_op(
    "batchnorm::moments",
    _moments,
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, int groups) -> (Tensor, Tensor, Tensor)",
)


@_registered_moments.register_fake
def _(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((groups, x.shape[1]), dtype=accumulator(x))
    return torch.empty_like(mean, dtype=torch.int64), mean, torch.empty_like(mean)


_registered = torch.library.custom_op(
    "batchnorm::batch_norm",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_registered.register_fake
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


def _keep_registered(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _keep(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward_registered(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _differentiated(ctx, dy, *ctx.needs_input_grad[3:5])


_registered.register_autograd(_backward_registered, setup_context=_keep_registered)


@torch.library.custom_op(
    "batchnorm::batch_norm_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}, bool affine) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _registered_backward(*arguments: Any) -> tuple[Tensor, ...]:
    x = arguments[1]
    # a registered operation returns tensors: an empty one for None
    return tuple(x.new_empty(0) if g is None else g for g in _gradients(*arguments))


@_registered_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    affine = rest[-1]
    inputs = (x, residual, weight if affine else None, bias if affine else None)
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in inputs)

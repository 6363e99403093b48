"""The differentiable operation: to PyTorch's compilers a registered one, in eager mode a function.

Tensors here are (n, c, *p) and masks (n, *p); `groups` cuts n into slices that are normalized
apart, and statistics are (c,), or (groups, c) for more than one. The moments come in as x's own
or, where `frozen`, as constants; None asks for x's own to be computed on the way. The work is
done by the backend that serves the input. The registered operations are opaque to a compiler and
have fakes for shapes; plain tensors in eager mode are spared their dispatch, which costs more
than a small tensor does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional.recipe import Normalization, Settings, observer
from batchnorm.kernels import (
    Activation,
    Epilogue,
    Gradients,
    accumulator,
    backend_for,
    reference,
)
from batchnorm.moments import Moments

__all__ = ["again", "constant", "epilogue_of", "is_plain", "laid_out_like", "moments", "normalize"]

_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? count, "
    "Tensor? mean, Tensor? m2, bool frozen, int groups, float eps, str act, float parameter"
)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Moments | None,
    settings: Settings,
) -> tuple[Tensor, Moments]:
    """y, and the moments that it was normalized by."""
    if not is_plain(x, residual, mask, weight, bias):
        three = (None, None, None) if given is None else (given.count, given.mean, given.m2)
        y, *computed = torch.ops.batchnorm.batch_norm(
            x, residual, mask, weight, bias, *three, *settings
        )
        return y, Moments(*computed) if given is None else given
    if not torch.is_grad_enabled():
        return _forward(x, residual, mask, weight, bias, given, settings)
    used: list[Moments] = []
    recorded: Tensor = _record(x, residual, weight, bias, mask, given, settings, used)
    if observer.notify is not None and recorded.requires_grad:
        how = Normalization(used[0], settings, x, residual, mask, weight, bias)
        observer.notify(recorded, how)
    return recorded, used[0]


def moments(x: Tensor, mask: Tensor | None, groups: int) -> Moments:
    """Count, mean and m2 of each group and channel; not differentiable."""
    compute = _moments if is_plain(x, mask) else torch.ops.batchnorm.moments
    return Moments(*compute(x, mask, groups))


def constant(buffer: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a buffer holds now, for a backward pass that may come after its next update.

    A compiler must not take it for the buffer: instead of keeping a copy it would read the
    buffer again in the backward pass. (PyTorch's min-cut partitioner does, as of 2.13.)
    """
    dtype = dtype or buffer.dtype
    if is_plain(buffer) or torch.compiler.is_exporting():  # a program must run without us
        return buffer.detach().to(dtype, copy=torch.is_grad_enabled())
    held: Tensor = torch.ops.batchnorm.constant(buffer.detach())
    return held.to(dtype)


def again(normalization: Normalization) -> Tensor:
    """The same y to the same bits, for autograd a constant."""
    n = normalization
    with torch.no_grad():
        return _forward(n.x, n.residual, n.mask, n.weight, n.bias, n.moments, n.settings)[0]


def epilogue_of(
    residual: Tensor | None, mask: Tensor | None, act: str, parameter: float
) -> Epilogue:
    """The kernels' epilogue from an operation's flat arguments."""
    mask = None if mask is None else mask.unsqueeze(1)
    return Epilogue(residual, mask, _activation(act, parameter))


_activation = lru_cache(Activation)  # a call of it would cost as much as a launch


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nobody looks on: no compiler, no dispatch mode, no subclass of tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return False
    for tensor in tensors:  # a loop, not a generator: every layer's every call comes by
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter and tensor is not None:
            return False
    return True


def laid_out_like(x: Tensor, y: Tensor) -> Tensor:
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
    given: Moments | None,
    settings: Settings,
) -> tuple[Tensor, Moments]:
    _, groups, eps, act, parameter = settings
    epilogue = epilogue_of(residual, mask, act, parameter)
    backend = backend_for(x, epilogue)
    y, used = backend.forward(x, weight, bias, eps, epilogue, groups, given)
    return laid_out_like(x, y), used


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    used: Moments,
    settings: Settings,
    affine: bool,
) -> Gradients:
    frozen, _, eps, act, parameter = settings
    epilogue = epilogue_of(residual, mask, act, parameter)
    dx, d_residual, d_weight, d_bias = backend_for(x, epilogue).backward(
        dy, x, used, weight, bias, eps, epilogue, frozen=frozen, affine=affine
    )
    dx = laid_out_like(x, dx)
    if residual is not None and d_residual is not None:
        d_residual = laid_out_like(residual, d_residual)
    return Gradients(dx, d_residual, d_weight, d_bias)


def _keep(
    ctx: Any,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    used: Moments,
    settings: Settings,
) -> None:
    """Save what the backward pass asks for."""
    ctx.settings = settings
    ctx.residual_dtype = None if residual is None else residual.dtype
    # only the derivative of an activation asks for the residual again
    kept = None if settings.act == "identity" else residual
    ctx.save_for_backward(x, kept, mask, weight, bias, used.count, used.mean, used.m2)


def _differentiated(ctx: Any, dy: Tensor, affine: bool) -> Gradients:
    """The gradients of x, residual, weight and bias."""
    x, residual, mask, weight, bias, *three = ctx.saved_tensors
    settings = ctx.settings
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(
            dy, x, residual, mask, weight, bias, Moments(*three), settings
        )
    elif is_plain(dy, x, residual, weight, bias):
        gradients = _gradients(
            dy, x, residual, mask, weight, bias, Moments(*three), settings, affine
        )
    else:
        registered = torch.ops.batchnorm.batch_norm_backward
        gradients = Gradients(
            *registered(dy, x, residual, mask, weight, bias, *three, *settings, affine)
        )
    d_residual = None if residual is None else gradients.residual
    if ctx.residual_dtype is not None and residual is None:
        d_residual = dy if mask is None else dy.where(mask.unsqueeze(1), 0)
        d_residual = d_residual.to(ctx.residual_dtype)
    d_weight = gradients.weight if affine and weight is not None else None
    d_bias = gradients.bias if affine and bias is not None else None
    return Gradients(gradients.x, d_residual, d_weight, d_bias)


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    used: Moments,
    settings: Settings,
) -> Gradients:
    """The gradients by the reference's plain operations, which autograd can follow again."""
    frozen, groups, eps, act, parameter = settings
    epilogue = epilogue_of(residual, mask, act, parameter)
    # as a function of x, for the second derivative runs through the statistics too
    batch = used if frozen else reference.moments(x, epilogue.mask, groups)
    return reference.backward(dy, x, batch, weight, bias, eps, epilogue, frozen=frozen)


class _BatchNorm(torch.autograd.Function):
    """The same in eager mode, where what autograd does for each output costs more than a kernel.

    So the moments leave by a list. (And a `setup_context` would cost more than all the rest.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        given: Moments | None,
        settings: Settings,
        used: list[Moments],
    ) -> Tensor:
        y, moments = _forward(x, residual, mask, weight, bias, given, settings)
        used.append(moments)
        _keep(ctx, x, residual, mask, weight, bias, moments, settings)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        return *_differentiated(ctx, dy, needed[2] or needed[3]), None, None, None, None


# past a wrapper that looks for torch.func's transforms, which get the composite form
_record: Any = super(torch.autograd.Function, _BatchNorm).apply


_registered_constant = torch.library.custom_op(
    "batchnorm::constant", torch.clone, mutates_args=(), schema="(Tensor buffer) -> Tensor"
)
_registered_constant.register_fake(torch.empty_like)

_registered_moments = torch.library.custom_op(
    "batchnorm::moments",
    _moments,
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, int groups) -> (Tensor, Tensor, Tensor)",
)


@_registered_moments.register_fake
def _(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[1:2] if groups == 1 else (groups, x.shape[1])
    mean = x.new_empty(shape, dtype=accumulator(x))
    return torch.empty_like(mean, dtype=torch.int64), mean, torch.empty_like(mean)


def _registered_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the moments that were computed on the way; empty tensors where they were given."""
    x, residual, mask, weight, bias, *three = arguments[:8]
    given = None if three[0] is None else Moments(*three)
    y, used = _forward(x, residual, mask, weight, bias, given, Settings(*arguments[8:]))
    if given is None:
        return y, used.count, used.mean, used.m2
    return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)


_registered = torch.library.custom_op(
    "batchnorm::batch_norm",
    _registered_forward,
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
    x, residual, mask, weight, bias, *three = inputs[:8]
    used = Moments(*(output[1:] if three[0] is None else three))
    _keep(ctx, x, residual, mask, weight, bias, used, Settings(*inputs[8:]))
    ctx.mark_non_differentiable(*output[1:])


def _backward_registered(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    dx, d_residual, d_weight, d_bias = _differentiated(ctx, dy, needed[3] or needed[4])
    return dx, d_residual, None, d_weight, d_bias, *(None,) * 8


_registered.register_autograd(_backward_registered, setup_context=_keep_registered)


@torch.library.custom_op(
    "batchnorm::batch_norm_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}, bool affine) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _registered_backward(*arguments: Any) -> tuple[Tensor, ...]:
    dy, x, residual, mask, weight, bias, *three = arguments[:9]
    *settings, affine = arguments[9:]
    gradients = _gradients(
        dy, x, residual, mask, weight, bias, Moments(*three), Settings(*settings), affine
    )
    # a registered operation returns tensors: an empty one for None
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


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

"""The CPU backend: loops compiled by Numba, on PyTorch's own threads.

It takes float32, float64 and bfloat16 in every layout; what it cannot walk it copies first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.contract import Coefficients, Epilogue, Gradients, compute_dtype
from batchnorm.kernels.cpu.launcher import STORAGE, Settings, launch
from batchnorm.kernels.cpu.library import reason_without
from batchnorm.kernels.cpu.plan import Plan, layout_of, plan_of
from batchnorm.moments import Moments

__all__ = [
    "apply",
    "backward",
    "backward_apply",
    "backward_reduce",
    "forward",
    "moments",
    "reason_without",
    "serves",
    "track",
]


def serves(x: Tensor, epilogue: Epilogue) -> bool:
    """Tensors on the CPU of the three dtypes, with values, without a mask."""
    residual = epilogue.residual
    return (
        x.dtype in STORAGE
        and x.device.type == "cpu"
        and epilogue.mask is None
        and (residual is None or residual.dtype == x.dtype)
        and x.numel() > 0
        and x.layout is torch.strided
        and not x.is_neg()
        and reason_without() is None
    )


def moments(x: Tensor, mask: Tensor | None = None, groups: int = 1) -> Moments:
    """Count, mean and m2 of each channel of each group: (g, c)."""
    x, plan = _planned(x, groups)
    mean, m2 = _statistics(plan)
    _moments(x, plan, mean, m2)
    return Moments(_counts(plan), mean, m2)


def apply(x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
    """y = act((x − center)·scale + shift + residual)."""
    x, plan = _planned(x, coefficients.center.shape[0])
    y = _new(x, plan)
    _apply(x, plan, coefficients, epilogue, y)
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """Σg and Σg·(x − center): (g, c) each."""
    x, plan = _planned(x, coefficients.center.shape[0])
    total, projection = _statistics(plan)
    _backward_reduce(_fitting(dy, x, plan), x, plan, coefficients, epilogue, total, projection)
    return total, projection


def backward_apply(
    dy: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """dx = scale·(g + (x − center)·slope + offset), and g where there is a residual."""
    x, plan = _planned(x, coefficients.center.shape[0])
    dy, dx = _fitting(dy, x, plan), _new(x, plan)
    dtype = compute_dtype(x)
    slope, offset = _as(slope, dtype), _as(offset, dtype)
    g = None if epilogue.residual is None else _new(x, plan)
    _backward_apply(dy, x, plan, coefficients, epilogue, slope, offset, dx, g)
    return dx, g


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    groups: int = 1,
    given: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """`moments`, where none are given, and `apply`."""
    x, plan = _planned(x, groups)
    y, dtype = _new(x, plan), compute_dtype(x)
    weight, bias = _parameter(weight, dtype), _parameter(bias, dtype)
    if given is None:
        mean, m2 = _statistics(plan)
        counts = None
    else:
        mean, m2 = _as(given.mean, torch.float64), _as(given.m2, torch.float64)
        counts = given.count.contiguous()
    if plan.is_fused:
        launch(
            "forward", plan, x.dtype, Settings(eps, *_act(epilogue)), x=x, y=y,
            residual=_residual(epilogue, x, plan), mean=mean, m2=m2, counts=counts,
            weight=weight, bias=bias,
        )  # fmt: skip
    else:
        if given is None:
            _moments(x, plan, mean, m2)
        coefficients = _coefficients(x, plan, mean, m2, counts, weight, bias, eps)
        _apply(x, plan, coefficients, epilogue, y)
    return y, given or Moments(_counts(plan), mean, m2)


def backward(
    dy: Tensor,
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    *,
    frozen: bool,
    affine: bool = True,
) -> Gradients:
    """`backward_reduce` and `backward_apply`."""
    x, plan = _planned(x, moments.mean.shape[0])
    dy, dx, dtype = _fitting(dy, x, plan), _new(x, plan), compute_dtype(x)
    g = None if epilogue.residual is None else _new(x, plan)
    mean, m2 = _as(moments.mean, torch.float64), _as(moments.m2, torch.float64)
    counts = moments.count.contiguous()
    wide_weight, wide_bias = _parameter(weight, dtype), _parameter(bias, dtype)
    d_weight = torch.empty(plan.channels, dtype=dtype) if affine and weight is not None else None
    d_bias = torch.empty(plan.channels, dtype=dtype) if affine and bias is not None else None
    reduces = not frozen or d_weight is not None or d_bias is not None
    if plan.is_fused:
        launch(
            "backward", plan, x.dtype, Settings(eps, *_act(epilogue), frozen, reduces), x=x,
            dy=dy, dx=dx, g=g, residual=_residual(epilogue, x, plan), mean=mean, m2=m2,
            counts=counts, weight=wide_weight, bias=wide_bias, d_weight=d_weight, d_bias=d_bias,
        )  # fmt: skip
    else:
        coefficients = _coefficients(x, plan, mean, m2, counts, wide_weight, wide_bias, eps)
        slope, offset = torch.zeros((2, plan.groups, plan.channels), dtype=dtype)
        if reduces:
            total, projection = _statistics(plan)
            _backward_reduce(dy, x, plan, coefficients, epilogue, total, projection)
            launch(
                "slopes", plan, x.dtype, Settings(eps, frozen=frozen), total=total,
                projection=projection, slope=slope, offset=offset, mean=mean, m2=m2,
                counts=counts, weight=wide_weight, bias=wide_bias, d_weight=d_weight,
                d_bias=d_bias,
            )  # fmt: skip
        _backward_apply(dy, x, plan, coefficients, epilogue, slope, offset, dx, g)
    return Gradients(dx, g, _like(d_weight, weight), _like(d_bias, bias))


def track(
    mean: Tensor, var: Tensor, batches: Tensor | None, batch: Moments, momentum: float | None
) -> None:
    """Move running statistics (c,) towards a batch's, in one call."""
    buffers = (mean, var) if batches is None else (mean, var, batches)
    if var.dtype != mean.dtype or not all(t.is_contiguous() for t in buffers):
        reference.track(mean, var, batches, batch, momentum)
        return
    plan = plan_of((1, *mean.shape), (1, 1), 1, mean.dtype.itemsize)
    assert plan is not None
    launch(
        "track", plan,
        mean.dtype, Settings(share=-1.0 if momentum is None else momentum), running_mean=mean,
        running_var=var, batches=batches, counts=batch.count, mean=_as(batch.mean, torch.float64),
        m2=_as(batch.m2, torch.float64),
    )  # fmt: skip
    if batches is not None:  # as torch.nn, whose kernel moves the other two unseen
        torch.autograd.graph.increment_version(batches)


def _planned(x: Tensor, groups: int) -> tuple[Tensor, Plan]:
    """x, copied where its strides are none that the kernels walk, and its plan."""
    plan = plan_of(x.shape, x.stride(), groups, x.dtype.itemsize)
    if plan is None:
        x = x.contiguous()
        plan = plan_of(x.shape, x.stride(), groups, x.dtype.itemsize)
        assert plan is not None
    return x, plan


def _new(x: Tensor, plan: Plan) -> Tensor:
    """An output for x, in strides that the plan can walk; as a rule those of `empty_like`."""
    y = torch.empty_like(x)
    if y.stride() == x.stride():
        return y
    layout = layout_of(plan.shape, y.stride())
    if layout is not None and plan.fits(layout):
        return y
    # x's values overlap or have gaps, and without them fall into an order of their own
    if plan.channels_last:
        n, c, *positions = plan.shape
        return torch.empty((n, *positions, c), dtype=x.dtype).movedim(-1, 1)
    return torch.empty(plan.shape, dtype=x.dtype)


def _act(epilogue: Epilogue) -> tuple[str, float]:
    return epilogue.act.name, epilogue.act.parameter


def _residual(epilogue: Epilogue, x: Tensor, plan: Plan) -> Tensor | None:
    return None if epilogue.residual is None else _fitting(epilogue.residual, x, plan)


def _fitting(tensor: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """A tensor of x's shape as it is where the plan fits its strides and dtype, else a copy."""
    if tensor.dtype == x.dtype and not tensor.is_neg():
        stride = tensor.stride()
        if stride == x.stride():
            return tensor
        layout = layout_of(plan.shape, stride)
        if layout is not None and plan.fits(layout):
            return tensor
    return _new(x, plan).copy_(tensor)


def _moments(x: Tensor, plan: Plan, mean: Tensor, m2: Tensor) -> None:
    partial = _partial(plan)
    launch(
        "moments", plan, x.dtype, x=x, mean=mean, m2=m2, partial_first=partial[0],
        partial_second=partial[1],
    )  # fmt: skip


def _coefficients(
    x: Tensor,
    plan: Plan,
    mean: Tensor,
    m2: Tensor,
    counts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Coefficients:
    parts = torch.empty((3, plan.groups, plan.channels), dtype=compute_dtype(x))
    coefficients = Coefficients(*parts)
    launch(
        "coefficients", plan, x.dtype, Settings(eps), mean=mean, m2=m2, counts=counts,
        weight=weight, bias=bias, **coefficients._asdict(),
    )  # fmt: skip
    return coefficients


def _apply(
    x: Tensor, plan: Plan, coefficients: Coefficients, epilogue: Epilogue, y: Tensor
) -> None:
    launch(
        "apply", plan, x.dtype, Settings(0.0, *_act(epilogue)), x=x, y=y,
        residual=_residual(epilogue, x, plan), **coefficients._asdict(),
    )  # fmt: skip


def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    coefficients: Coefficients,
    epilogue: Epilogue,
    total: Tensor,
    projection: Tensor,
) -> None:
    partial = _partial(plan)
    launch(
        "backward_reduce", plan, x.dtype, Settings(0.0, *_act(epilogue)), x=x, dy=dy,
        residual=_residual(epilogue, x, plan), total=total, projection=projection,
        partial_first=partial[0], partial_second=partial[1], **coefficients._asdict(),
    )  # fmt: skip


def _backward_apply(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
    dx: Tensor,
    g: Tensor | None,
) -> None:
    launch(
        "backward_apply", plan, x.dtype, Settings(0.0, *_act(epilogue)), x=x, dy=dy, dx=dx, g=g,
        residual=_residual(epilogue, x, plan), slope=slope, offset=offset,
        **coefficients._asdict(),
    )  # fmt: skip


def _partial(plan: Plan) -> Tensor:
    """Room for what the segments of a channel leave: two numbers each."""
    return torch.empty((2, plan.groups, plan.segments, plan.channels), dtype=torch.float64)


def _statistics(plan: Plan) -> tuple[Tensor, Tensor]:
    """Room for two numbers of each channel of each group."""
    shape = (plan.groups, plan.channels)
    return torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)


def _counts(plan: Plan) -> Tensor:
    return torch.full((plan.groups, plan.channels), plan.count)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A small tensor as the kernels read it: of one dtype and without gaps."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _parameter(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _as(tensor, dtype)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None or gradient.dtype == parameter.dtype:
        return gradient
    return gradient.to(parameter.dtype)

"""The CPU backend: loops compiled by Numba, on PyTorch's own threads.

It takes float32, float64 and bfloat16 in every layout; what it cannot walk it copies first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.contract import (
    Coefficients,
    Epilogue,
    Gradients,
    compute_dtype,
    groups_of,
)
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
    """Count, mean and m2 of each channel of each group."""
    x, plan = _planned(x, groups)
    batch = _unknown(plan)
    _moments(x, plan, batch)
    return batch


def apply(x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
    """y = act((x − center)·scale + shift + residual)."""
    x, plan = _planned(x, groups_of(coefficients.center))
    y = _new(x, plan)
    launch(
        "forward", plan, x.dtype, _settings(epilogue, known=True), x=x, y=y,
        residual=_residual(epilogue, x, plan), **coefficients._asdict(),
    )  # fmt: skip
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """Σg and Σg·(x − center)."""
    x, plan = _planned(x, groups_of(coefficients.center))
    operands = {
        "x": x,
        "dy": _fitting(dy, x, plan),
        "residual": _residual(epilogue, x, plan),
        **coefficients._asdict(),
    }
    return _backward_reduce(plan, x.dtype, _settings(epilogue), operands)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """dx = scale·(g + (x − center)·slope + offset), and g where there is a residual."""
    x, plan = _planned(x, groups_of(coefficients.center))
    dy, dx = _fitting(dy, x, plan), _new(x, plan)
    dtype = compute_dtype(x)
    g = None if epilogue.residual is None else _new(x, plan)
    launch(
        "backward_apply", plan, x.dtype, _settings(epilogue), x=x, dy=dy, dx=dx, g=g,
        residual=_residual(epilogue, x, plan), slope=_as(slope, dtype),
        offset=_as(offset, dtype), **coefficients._asdict(),
    )  # fmt: skip
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
    known = given is not None or not plan.is_fused
    if given is None:
        batch = _unknown(plan)
        if known:
            _moments(x, plan, batch)
    else:
        batch = _as_read(given)
    launch(
        "forward", plan, x.dtype, _settings(epilogue, eps, known=known), x=x, y=y,
        residual=_residual(epilogue, x, plan), counts=batch.count, mean=batch.mean, m2=batch.m2,
        weight=_parameter(weight, dtype), bias=_parameter(bias, dtype),
    )  # fmt: skip
    return y, batch if given is None else given


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
    x, plan = _planned(x, groups_of(moments.mean))
    dy, dx, dtype = _fitting(dy, x, plan), _new(x, plan), compute_dtype(x)
    g = None if epilogue.residual is None else _new(x, plan)
    batch = _as_read(moments)
    d_weight = torch.empty(plan.channels, dtype=dtype) if affine and weight is not None else None
    d_bias = torch.empty(plan.channels, dtype=dtype) if affine and bias is not None else None
    operands = {
        "x": x,
        "dy": dy,
        "residual": _residual(epilogue, x, plan),
        "counts": batch.count,
        "mean": batch.mean,
        "m2": batch.m2,
        "weight": _parameter(weight, dtype),
        "bias": _parameter(bias, dtype),
    }
    reduces = not frozen or d_weight is not None or d_bias is not None
    settings = _settings(epilogue, eps, frozen=frozen, reduces=reduces)
    if reduces and not plan.is_fused:
        sums = _backward_reduce(plan, x.dtype, settings, operands)
        operands["total"], operands["projection"] = sums
        settings = settings._replace(known=True)
    launch(
        "backward", plan, x.dtype, settings, dx=dx, g=g, d_weight=d_weight, d_bias=d_bias,
        **operands,
    )  # fmt: skip
    return Gradients(dx, g, _like(d_weight, weight), _like(d_bias, bias))


def track(
    mean: Tensor, var: Tensor, batches: Tensor | None, batch: Moments, momentum: float | None
) -> None:
    """Move running statistics (c,) towards a batch's, in one call."""
    if var.dtype != mean.dtype or not (mean.is_contiguous() and var.is_contiguous()):
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


def _settings(epilogue: Epilogue, eps: float = 0.0, **others: bool) -> Settings:
    return Settings(eps, epilogue.act.name, epilogue.act.parameter, **others)


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


def _unknown(plan: Plan) -> Moments:
    """The moments of a plan's channels, with room for mean and m2."""
    shape = plan.statistics
    mean, m2 = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    return Moments(torch.full(shape, plan.count), mean, m2)


def _moments(x: Tensor, plan: Plan, batch: Moments) -> None:
    """Fill in mean and m2."""
    first, second = _partial(plan)
    launch(
        "moments", plan, x.dtype, x=x, mean=batch.mean, m2=batch.m2, partial_first=first,
        partial_second=second,
    )  # fmt: skip


def _backward_reduce(
    plan: Plan, dtype: torch.dtype, settings: Settings, operands: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    total, projection = (torch.empty(plan.statistics, dtype=torch.float64) for _ in range(2))
    first, second = _partial(plan)
    launch(
        "backward_reduce", plan, dtype, settings, total=total, projection=projection,
        partial_first=first, partial_second=second, **operands,
    )  # fmt: skip
    return total, projection


def _partial(plan: Plan) -> tuple[Tensor, Tensor]:
    """Room for what the segments of a channel leave: two numbers each."""
    shape = (plan.segments, *plan.statistics)
    return torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)


def _as_read(moments: Moments) -> Moments:
    """Moments as the kernels read them."""
    mean, m2 = _as(moments.mean, torch.float64), _as(moments.m2, torch.float64)
    return Moments(_as(moments.count, torch.int64), mean, m2)


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

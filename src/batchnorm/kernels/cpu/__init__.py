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
from batchnorm.kernels.cpu.plan import Plan, plan_of
from batchnorm.kernels.layout import empty_beside, fitting
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


_CPU = torch.device("cpu")


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
    x, plan = _planned(x, groups_of(coefficients.center), once=True)
    y = empty_beside(x, plan)
    launch(
        "forward", plan, x.dtype, _settings(epilogue, known=True), x=x, y=y,
        residual=_residual(epilogue, x, plan), **_coefficients(coefficients, x),
    )  # fmt: skip
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σg and Σg·(x − center), and g where there is a residual."""
    x, plan = _planned(x, groups_of(coefficients.center))
    operands = {**_operands(dy, x, plan, epilogue), **_coefficients(coefficients, x)}
    sums = _sums(plan)
    launch("backward_reduce", plan, x.dtype, _settings(epilogue), **operands, **sums)
    return sums["total"], sums["projection"], operands["g"]


def backward_apply(
    dy: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """dx = scale·(g + (x − center)·slope + offset)."""
    assert epilogue.residual is None
    x, plan = _planned(x, groups_of(coefficients.center), once=True)
    dx, dtype = empty_beside(x, plan), compute_dtype(x)
    launch(
        "backward_apply", plan, x.dtype, _settings(epilogue), dx=dx, slope=_as(slope, dtype),
        offset=_as(offset, dtype), **_operands(dy, x, plan, epilogue),
        **_coefficients(coefficients, x),
    )  # fmt: skip
    return dx


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
    x, plan = _planned(x, groups, once=given is not None)
    y, dtype = empty_beside(x, plan), compute_dtype(x)
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
    """`backward_reduce` and `backward_apply`; in one sweep where the moments are constants."""
    x, plan = _planned(x, groups_of(moments.mean), once=frozen)
    dx, dtype, batch = empty_beside(x, plan), compute_dtype(x), _as_read(moments)
    d_weight = _empty((plan.channels,), dtype) if affine and weight is not None else None
    d_bias = _empty((plan.channels,), dtype) if affine and bias is not None else None
    operands = {
        **_operands(dy, x, plan, epilogue),
        "counts": batch.count,
        "mean": batch.mean,
        "m2": batch.m2,
        "weight": _parameter(weight, dtype),
        "bias": _parameter(bias, dtype),
    }
    settings = _settings(epilogue, eps, known=not plan.is_fused)
    sums: dict[str, Tensor] = {}
    if frozen or settings.known:
        sums = _sums(plan)
    if settings.known and not frozen:
        launch("backward_reduce", plan, x.dtype, settings, **operands, **sums)
    launch(
        "backward_frozen" if frozen else "backward", plan, x.dtype, settings, dx=dx,
        d_weight=d_weight, d_bias=d_bias, **operands, **sums,
    )  # fmt: skip
    g = operands["g"]
    return Gradients(dx, g, _like(d_weight, weight), _like(d_bias, bias))


def track(
    mean: Tensor, var: Tensor, batches: Tensor | None, batch: Moments, momentum: float | None
) -> None:
    """Move running statistics (c,) towards a batch's, in one call."""
    is_usual = (
        var.dtype == mean.dtype
        and mean.dtype.itemsize >= 4
        and mean.is_contiguous()
        and var.is_contiguous()
        and (batches is None or batches.dtype == torch.int64)
    )
    if not is_usual:
        reference.track(mean, var, batches, batch, momentum)
        return
    plan = plan_of((1, *mean.shape), (1, 1), 1, mean.dtype.itemsize, True)
    assert plan is not None
    launch(
        "track", plan,
        mean.dtype, Settings(share=-1.0 if momentum is None else momentum), running_mean=mean,
        running_var=var, batches=batches, counts=_as(batch.count, torch.int64),
        mean=_as(batch.mean, torch.float64), m2=_as(batch.m2, torch.float64),
    )  # fmt: skip
    if batches is not None:  # as torch.nn, whose kernel moves the other two unseen
        torch.autograd.graph.increment_version(batches)


def _planned(x: Tensor, groups: int, *, once: bool = False) -> tuple[Tensor, Plan]:
    """x, copied where its strides are none that the kernels walk, and its plan.

    `once`: for a kernel that goes over the tensor once.
    """
    plan = plan_of(x.shape, x.stride(), groups, x.dtype.itemsize, once)
    if plan is None:
        x = x.contiguous()
        plan = plan_of(x.shape, x.stride(), groups, x.dtype.itemsize, once)
        assert plan is not None
    return x, plan


def _settings(epilogue: Epilogue, eps: float = 0.0, **others: bool) -> Settings:
    return Settings(eps, epilogue.act.name, epilogue.act.parameter, **others)


def _residual(epilogue: Epilogue, x: Tensor, plan: Plan) -> Tensor | None:
    return None if epilogue.residual is None else _fitting(epilogue.residual, x, plan)


def _fitting(tensor: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """A tensor of x's shape as the loops read it: in their layouts and of x's dtype."""
    return fitting(tensor if tensor.dtype == x.dtype else tensor.to(x.dtype), x, plan)


def _unknown(plan: Plan) -> Moments:
    """The moments of a plan's channels, with room for mean and m2."""
    shape = plan.statistics
    mean, m2 = _empty(shape, torch.float64), _empty(shape, torch.float64)
    return Moments(torch.full(shape, plan.count, device=_CPU), mean, m2)


def _moments(x: Tensor, plan: Plan, batch: Moments) -> None:
    """Fill in mean and m2."""
    first, second = _partial(plan)
    launch(
        "moments", plan, x.dtype, x=x, mean=batch.mean, m2=batch.m2, partial_first=first,
        partial_second=second,
    )  # fmt: skip


def _operands(dy: Tensor, x: Tensor, plan: Plan, epilogue: Epilogue) -> dict[str, Tensor | None]:
    """What every backward kernel takes."""
    residual = _residual(epilogue, x, plan)
    g = None if residual is None else empty_beside(x, plan)
    return {"x": x, "dy": _fitting(dy, x, plan), "residual": residual, "g": g}


def _sums(plan: Plan) -> dict[str, Tensor]:
    """Room for Σg and Σg·(x − center), and for their parts."""
    first, second = _partial(plan)
    shape = plan.statistics
    return {
        "total": _empty(shape, torch.float64),
        "projection": _empty(shape, torch.float64),
        "partial_first": first,
        "partial_second": second,
    }


def _partial(plan: Plan) -> tuple[Tensor, Tensor]:
    """Room for what the segments of a channel leave: two numbers each."""
    shape = (plan.segments, *plan.statistics)
    return _empty(shape, torch.float64), _empty(shape, torch.float64)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for numbers; on the CPU, for PyTorch's default may be another device."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _coefficients(given: Coefficients, x: Tensor) -> dict[str, Tensor]:
    """Coefficients as the kernels read them."""
    dtype = compute_dtype(x)
    return {name: _as(tensor, dtype) for name, tensor in given._asdict().items()}


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

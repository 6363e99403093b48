"""The GPU backend: kernels in Triton's language, for float32, bfloat16 and float16.

Sums are split over positions as well as channels and merged in one order, without atomics: on one
kind of GPU the same input gives the same bits. Where a program can hold all values of a channel,
each pass is one kernel that reads its tensors once. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.activation import IDENTITY, Activation
from batchnorm.kernels.contract import Coefficients, Epilogue, Gradients, groups_of
from batchnorm.kernels.gpu.launcher import launch
from batchnorm.kernels.gpu.library import reason_without, reason_without_on
from batchnorm.kernels.gpu.plan import Plan, plan_of, whole_plan_of
from batchnorm.kernels.layout import empty_beside, fitting
from batchnorm.kernels.switch import INTERPRETER, switched_to
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

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
LARGEST = 2**31  # values of a channel are too many: the kernels count them in 32 bits
MERGED = {16: 1, 256: 4, 1024: 16}  # parts that a merging program has at a time, and its warps
ABREAST = 4  # channels of a merging program
TRACKED = 1024  # channels that the tracking program has at a time


def serves(x: Tensor, epilogue: Epilogue) -> bool:
    """Tensors on a GPU of the three dtypes, with values, without a mask."""
    residual = epilogue.residual
    return (
        (x.device.type == "cuda" or (x.device.type == "cpu" and switched_to() == INTERPRETER))
        and x.dtype in DTYPES
        and epilogue.mask is None
        and (residual is None or residual.dtype in DTYPES)
        and 0 < x.numel() < LARGEST * (x.shape[1] if x.ndim > 1 else 1)
        and x.layout is torch.strided
        and not x.is_neg()
        and reason_without_on(x.device) is None
    )


def moments(x: Tensor, mask: Tensor | None = None, groups: int = 1) -> Moments:
    """Count, mean and m2 of each channel of each group."""
    return _moments(*_planned(x, groups))


def apply(x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
    """y = act((x − center)·scale + shift + residual)."""
    x, plan = _planned(x, groups_of(coefficients.center))
    return _apply(x, plan, epilogue, _known(coefficients))


def backward_reduce(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σg and Σg·(x − center), and g where there is a residual."""
    x, plan = _planned(x, groups_of(coefficients.center))
    operands = _operands(dy, x, plan, epilogue)
    parts = _partial_sums(operands, plan, epilogue, _known(coefficients))
    total = x.new_empty(plan.statistics, dtype=torch.float64)
    about_center = torch.empty_like(total)
    _merge_sums(parts, plan, total=total, about_center=about_center)
    return total, about_center, operands["g"]


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
    x, plan = _planned(x, groups_of(coefficients.center))
    line = slope.contiguous(), offset.contiguous()
    return _input_gradient(fitting(dy, x, plan), x, plan, epilogue.act, coefficients, line)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    groups: int = 1,
    given: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """`moments`, where none are given, and `apply`; in one kernel where channels fit it."""
    x, plan = _planned(x, groups)
    if given is not None:
        return _apply(x, plan, epilogue, _unknown(given, weight, bias, eps)), given
    whole = whole_plan_of(plan, 1)
    if whole is None:
        coefficients = _empty_coefficients(x, plan)
        batch = _moments(x, plan, **_affine(weight, bias, eps), **coefficients._asdict())
        return _apply(x, plan, epilogue, _known(coefficients)), batch
    batch = _empty_moments(x, plan)
    residual = _residual(epilogue, x, plan)
    y = empty_beside(x, plan, _output_dtype(x, residual))
    launch(
        "whole_forward", whole.blocks * whole.groups, x.device, whole,
        {"x": x, "y": y, "residual": residual}, ACT=epilogue.act.name,
        parameter=epilogue.act.parameter, **_statistics(batch), **_affine(weight, bias, eps),
    )  # fmt: skip
    return y, batch


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
    x, plan = _planned(x, groups_of(moments.mean))
    dx = empty_beside(x, plan)
    operands = _operands(dy, x, plan, epilogue)
    gradients = {
        "d_weight": _room_for(weight, plan) if affine else None,
        "d_bias": _room_for(bias, plan) if affine else None,
    }
    whole = None if frozen else whole_plan_of(plan, 2)
    if whole is not None:
        launch(
            "whole_backward", whole.blocks * whole.groups, x.device, whole, {**operands, "dx": dx},
            ACT=epilogue.act.name, parameter=epilogue.act.parameter, **_statistics(moments),
            **_affine(weight, bias, eps), **gradients,
        )  # fmt: skip
    elif frozen:
        numbers = _unknown(moments, weight, bias, eps)
        asked = any(gradient is not None for gradient in gradients.values())
        parts = _partial_sums(operands, plan, epilogue, numbers, dx, sums=asked)
        if asked:
            _merge_sums(parts, plan, **_statistics(moments), eps=eps, **gradients)
    else:
        numbers = _unknown(moments, weight, bias, eps)
        parts = _partial_sums(operands, plan, epilogue, numbers)
        slope, offset = x.new_empty((2, *plan.statistics), dtype=torch.float32)
        coefficients = _empty_coefficients(x, plan)
        _merge_sums(
            parts, plan, slope=slope, offset=offset, **coefficients._asdict(),
            **_statistics(moments), **_affine(weight, bias, eps), **gradients,
        )  # fmt: skip
        dy, act = operands["dy"], epilogue.act
        if operands["g"] is not None:  # the activation is behind it
            dy, act = operands["g"], IDENTITY
        _input_gradient(dy, x, plan, act, coefficients, (slope, offset), dx)
    g = operands["g"]
    return Gradients(
        dx,
        None if g is None or epilogue.residual is None else g.to(epilogue.residual.dtype),
        _over_groups(gradients["d_weight"], weight),
        _over_groups(gradients["d_bias"], bias),
    )


def track(
    mean: Tensor, var: Tensor, batches: Tensor | None, batch: Moments, momentum: float | None
) -> None:
    """Move running statistics (c,) towards a batch's, in one kernel."""
    is_usual = (
        mean.dtype in DTYPES
        and var.dtype in DTYPES
        and mean.is_contiguous()
        and var.is_contiguous()
        and batch.mean.dtype == torch.float64
    )
    if not is_usual:
        reference.track(mean, var, batches, batch, momentum)
        return
    averages = momentum is None and batches is not None
    launch(
        "track", 1, mean.device, running_mean=mean, running_var=var, batches=batches,
        share=0.0 if momentum is None else momentum, channels=len(mean), AVERAGE=averages,
        COLUMNS=TRACKED, **_statistics(batch),
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


def _moments(x: Tensor, plan: Plan, **asked: Any) -> Moments:
    """In two kernels: parts, and their merging, which computes the coefficients where asked."""
    batch = _empty_moments(x, plan)
    segments = -(-plan.tiles // plan.summed)
    parts = x.new_empty((plan.groups, segments, 5, plan.columns), dtype=torch.float32)
    launch(
        "partial_moments", plan.blocks * segments * plan.groups, x.device, plan, {"x": x},
        parts=parts, tiles=plan.tiles, run=plan.summed, segments=segments,
    )  # fmt: skip
    nothing = dict.fromkeys(("weight", "bias", *Coefficients._fields))
    _merge("merge_moments", parts, plan, **_statistics(batch), **{**nothing, "eps": 0.0, **asked})
    return batch


def _merge(name: str, parts: Tensor, plan: Plan, **arguments: Any) -> None:
    """Merge parts (groups, segments, …, columns) of each channel of each group."""
    entries = parts.shape[1] * plan.repeat
    blocks = -(-plan.channels // ABREAST)
    lanes = next((lanes for lanes in MERGED if entries <= lanes), max(MERGED))
    launch(
        name, blocks * plan.groups, parts.device, parts=parts, entries=entries,
        repeat=plan.repeat, channels=plan.channels, blocks=blocks, LANES=lanes, COLUMNS=ABREAST,
        num_warps=MERGED[lanes], **arguments,
    )  # fmt: skip


def _merge_sums(parts: Tensor | None, plan: Plan, **arguments: Any) -> None:
    assert parts is not None
    results = ("total", "about_center", "d_weight", "d_bias", "slope", "offset")
    given = ("mean", "m2", "counts", "weight", "bias")
    nothing = dict.fromkeys((*results, *Coefficients._fields, *given))
    _merge("merge_sums", parts, plan, **{**nothing, "eps": 0.0, **arguments})


def _apply(x: Tensor, plan: Plan, epilogue: Epilogue, numbers: dict[str, Any]) -> Tensor:
    residual = _residual(epilogue, x, plan)
    y = empty_beside(x, plan, _output_dtype(x, residual))
    _sweep("apply", {"x": x, "y": y, "residual": residual}, plan, epilogue.act, numbers)
    return y


def _operands(dy: Tensor, x: Tensor, plan: Plan, epilogue: Epilogue) -> dict[str, Any]:
    """What a backward pass reads, and room for g where there is a residual."""
    residual = _residual(epilogue, x, plan)
    # as wide as x, whose gradient is computed from it
    g = None if residual is None else empty_beside(x, plan, _output_dtype(x, residual))
    return {"dy": fitting(dy, x, plan), "x": x, "residual": residual, "g": g}


def _partial_sums(
    operands: dict[str, Any],
    plan: Plan,
    epilogue: Epilogue,
    numbers: dict[str, Any],
    dx: Tensor | None = None,
    *,
    sums: bool = True,
) -> Tensor | None:
    """The sums' parts; dx too where the moments are constants."""
    run, parts = plan.swept, None
    if sums:
        run = plan.summed
        shape = (plan.groups, -(-plan.tiles // run), 2, plan.columns)
        parts = operands["x"].new_empty(shape, dtype=torch.float32)
    walked = {**operands, "dx": dx}
    _sweep("partial_sums", walked, plan, epilogue.act, numbers, run, parts=parts)
    return parts


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    act: Activation,
    coefficients: Coefficients,
    line: tuple[Tensor, Tensor],
    dx: Tensor | None = None,
) -> Tensor:
    """dx = scale·(g + (x − center)·slope + offset), with slope and offset the line."""
    dx = empty_beside(x, plan) if dx is None else dx
    numbers = {name: number.contiguous() for name, number in coefficients._asdict().items()}
    numbers |= {"slope": line[0], "offset": line[1]}
    _sweep("input_gradient", {"dy": dy, "x": x, "dx": dx}, plan, act, numbers)
    return dx


def _sweep(
    name: str,
    walked: dict[str, Any],
    plan: Plan,
    act: Activation,
    numbers: dict[str, Any],
    run: int | None = None,
    **arguments: Any,
) -> None:
    """Launch a kernel that goes over a tensor once, each program over `run` tiles."""
    run = plan.swept if run is None else run
    segments = -(-plan.tiles // run)
    launch(
        name, plan.blocks * segments * plan.groups, walked["x"].device, plan, walked,
        channels=plan.channels, tiles=plan.tiles, run=run, segments=segments, ACT=act.name,
        parameter=act.parameter, REPEATS=plan.repeat > 1, **numbers, **arguments,
    )  # fmt: skip


def _known(coefficients: Coefficients) -> dict[str, Any]:
    """A channel's numbers as they come."""
    first, second, third = (number.contiguous() for number in coefficients)
    return {
        "first": first, "second": second, "third": third, "KNOWN": True,
        **_affine(None, None, 0.0),
    }  # fmt: skip


def _unknown(
    moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> dict[str, Any]:
    """A channel's numbers as they follow from its moments, which the kernels compute."""
    first, second, third = moments.mean, moments.m2, moments.count
    return {
        "first": first.contiguous(), "second": second.contiguous(), "third": third.contiguous(),
        "KNOWN": False, **_affine(weight, bias, eps),
    }  # fmt: skip


def _statistics(moments: Moments) -> dict[str, Any]:
    """Moments by the kernels' names."""
    return {
        "counts": moments.count.contiguous(),
        "mean": moments.mean.contiguous(),
        "m2": moments.m2.contiguous(),
    }


def _affine(weight: Tensor | None, bias: Tensor | None, eps: float) -> dict[str, Any]:
    return {
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "eps": eps,
    }


def _empty_coefficients(x: Tensor, plan: Plan) -> Coefficients:
    return Coefficients(*x.new_empty((3, *plan.statistics), dtype=torch.float32))


def _empty_moments(x: Tensor, plan: Plan) -> Moments:
    mean = x.new_empty(plan.statistics, dtype=torch.float64)
    # each its own memory: a registered operation's results must not share it
    return Moments(torch.empty_like(mean, dtype=torch.int64), mean, torch.empty_like(mean))


def _residual(epilogue: Epilogue, x: Tensor, plan: Plan) -> Tensor | None:
    return None if epilogue.residual is None else fitting(epilogue.residual, x, plan)


def _output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _room_for(parameter: Tensor | None, plan: Plan) -> Tensor | None:
    """Room for a parameter's gradient, of each group."""
    if parameter is None:
        return None
    dtype = parameter.dtype if plan.groups == 1 else torch.float32
    return parameter.new_empty(plan.statistics, dtype=dtype)


def _over_groups(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The sum over groups, in the parameter's dtype."""
    if gradient is None or parameter is None or gradient.ndim == 1:
        return gradient
    return gradient.sum(0).to(parameter.dtype)

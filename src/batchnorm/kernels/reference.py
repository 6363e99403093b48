"""The reference backend: plain PyTorch operations, for every device and dtype.

Differentiable any number of times, and the definition that the other backends agree with.
Sums run over chunks cut by shape, in float64, so that their error does not grow with n and
their bits do not depend on the number of threads. (The activations are PyTorch's: the last bit
of an exp or tanh depends on whether it fell into a vector or into a thread's scalar rest.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.kernels.contract import (
    Coefficients,
    Epilogue,
    Gradients,
    Sums,
    accumulator,
    coefficients_of,
    compute_dtype,
    groups_of,
)
from batchnorm.moments import Moments

__all__ = [
    "apply",
    "backward",
    "backward_apply",
    "backward_reduce",
    "forward",
    "moments",
    "serves",
    "track",
]

# Values in a chunk. A float64 copy of so many (1 MB) stays in a core's cache.
CHUNK = 2**17
# PyTorch splits a reduction to a single number by threads from this size on, so that its
# bits would depend on their number; one channel of one group is cut smaller.
SINGLE_CHUNK = 2**15 - 1


def serves(x: Tensor, epilogue: Epilogue) -> bool:
    """Everything."""
    return True


def moments(x: Tensor, mask: Tensor | None = None, groups: int = 1) -> Moments:
    """Count, mean and m2 of each channel of each group."""
    x, epilogue = _grouped(x, Epilogue(mask=mask), groups)
    dims = _reduced(x)
    batch = Moments.merge(
        Moments.of(part, dims, mask=part_mask, dtype=accumulator(x))
        for part, part_mask in _chunks(x, epilogue.mask)
    )
    shape = x.shape[2:3] if groups == 1 else (groups, x.shape[2])
    return Moments(
        batch.count.reshape(shape).contiguous(), batch.mean.reshape(shape), batch.m2.reshape(shape)
    )


def apply(x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
    """y = act((x − center)·scale + shift + residual), 0 where masked."""
    x, epilogue = _prepared(x, epilogue, coefficients)
    y = epilogue.act(_before_activation(x, coefficients, epilogue))
    if epilogue.mask is not None:
        y = y.where(epilogue.mask, 0)
    return y.to(_output_dtype(x, epilogue)).flatten(0, 1)


def backward_reduce(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σg and Σg·(x − center), and g where there is a residual."""
    x, epilogue = _prepared(x, epilogue, coefficients)
    g = _through_activation(dy, x, coefficients, epilogue)
    return *_sums(g, x, coefficients.center), _residual_gradient(g, epilogue)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """dx = scale·(g + (x − center)·slope + offset)."""
    x, epilogue = _prepared(x, epilogue, coefficients)
    g = _through_activation(dy, x, coefficients, epilogue)
    return _input_gradient(g, x, coefficients, epilogue, slope, offset)


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
    batch = moments(x, epilogue.mask, groups) if given is None else given
    return apply(x, coefficients_of(x, batch, weight, bias, eps), epilogue), batch


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
    """`backward_reduce` and `backward_apply`, with g computed once.

    Where the moments are constants, dx = s·g with s = γ/√(var + ε).
    """
    wide = accumulator(x)  # constants come as they are kept
    moments = Moments(moments.count, moments.mean.to(wide), moments.m2.to(wide))
    coefficients = coefficients_of(x, moments, weight, bias, eps)
    x, epilogue = _prepared(x, epilogue, coefficients)
    g = _through_activation(dy, x, coefficients, epilogue)
    d_weight = d_bias = None
    slope = offset = torch.zeros_like(coefficients.scale)
    if affine or not frozen:
        sums = Sums.of(*_sums(g, x, coefficients.center), coefficients, moments)
        if affine and weight is not None:
            d_weight = _over_groups(sums.weight_gradient(moments, eps)).to(weight.dtype)
        if affine and bias is not None:
            d_bias = _over_groups(sums.total).to(bias.dtype)
        if not frozen:
            slope, offset = sums.slope_and_offset(coefficients, moments, eps)
    dx = _input_gradient(g, x, coefficients, epilogue, slope, offset)
    return Gradients(dx, _residual_gradient(g, epilogue), d_weight, d_bias)


def track(
    mean: Tensor, var: Tensor, batches: Tensor | None, batch: Moments, momentum: float | None
) -> None:
    """Move running statistics (c,) towards a batch's, without waiting for its values."""
    # a whole batch counts or none of it does, as a gradient scaler skips a whole step;
    # finite in the buffers' own dtype, which is narrower than the moments'
    new_mean, new_var = batch.mean.to(mean.dtype), batch.var(unbiased=True).to(var.dtype)
    usable = (new_mean.isfinite() & new_var.isfinite()).all()
    share: float | Tensor | None = momentum
    if batches is not None:
        batches.add_(usable)
        if share is None:  # the plain average of all batches
            share = 1 / batches.clamp(min=1).to(mean.dtype)
    share = 0.0 if share is None else share
    for statistic, new in ((mean, new_mean), (var, new_var)):
        moved = torch.lerp(statistic, new, share)
        statistic.copy_(torch.where(usable, moved, statistic))


def _grouped(x: Tensor, epilogue: Epilogue, groups: int) -> tuple[Tensor, Epilogue]:
    """Everything of (n, …) seen as (groups, n / groups, …), without a copy."""
    parts = (x, epilogue.residual, epilogue.mask)
    sizes = (groups, x.shape[0] // groups)
    views = [None if p is None else p.unflatten(0, sizes) for p in parts]
    assert views[0] is not None
    return views[0], Epilogue(views[1], views[2], epilogue.act)


def _prepared(x: Tensor, epilogue: Epilogue, per_group: Coefficients) -> tuple[Tensor, Epilogue]:
    return _cleaned(*_grouped(x, epilogue, groups_of(per_group.center)))


def _per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    """A (*g, c) statistic, shaped to broadcast against x (g, n, c, *p)."""
    return statistic.reshape(x.shape[0], 1, x.shape[2], *(1,) * (x.ndim - 3))


def _over_groups(statistic: Tensor) -> Tensor:
    """The sum over groups, (*g, c) → (c,)."""
    return statistic if statistic.ndim == 1 else statistic.sum(0)


def _residual_gradient(g: Tensor, epilogue: Epilogue) -> Tensor | None:
    residual = epilogue.residual
    return None if residual is None else g.to(residual.dtype).flatten(0, 1)


def _output_dtype(x: Tensor, epilogue: Epilogue) -> torch.dtype:
    residual = epilogue.residual
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _reduced(x: Tensor) -> tuple[int, ...]:
    """Every dimension but the groups and the channels."""
    return (1, *range(3, x.ndim))


def _cleaned(x: Tensor, epilogue: Epilogue) -> tuple[Tensor, Epilogue]:
    """Zeros under the mask: 0 · NaN would be no zero gradient."""
    mask, residual = epilogue.mask, epilogue.residual
    if mask is None:
        return x, epilogue
    residual = None if residual is None else residual.where(mask, 0)
    return x.where(mask, 0), epilogue._replace(residual=residual)


def _before_activation(x: Tensor, coefficients: Coefficients, epilogue: Epilogue) -> Tensor:
    """z = (x − center)·scale + shift + residual."""
    center, scale, shift = (_per_channel(c, x) for c in coefficients)
    z = torch.addcmul(shift, x - center, scale)
    return z if epilogue.residual is None else z + epilogue.residual


def _through_activation(
    dy: Tensor, x: Tensor, coefficients: Coefficients, epilogue: Epilogue
) -> Tensor:
    """g = dy · act'(z), 0 where masked; z is computed again, not stored."""
    g: Tensor = dy.unflatten(0, x.shape[:2]).to(compute_dtype(x))
    if epilogue.mask is not None:
        g = g.where(epilogue.mask, 0)
    if epilogue.act.name == "identity":
        return g
    z = _before_activation(x, coefficients, epilogue)
    return epilogue.act.backward(g.to(z.dtype), z)


def _sums(g: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Σg and Σg·(x − center) over chunks, in the accumulator's dtype."""
    dims, dtype = _reduced(x), accumulator(x)
    totals, projections = [], []
    for part_g, part_x in _chunks(g, x):
        assert part_x is not None
        part_g = part_g.to(dtype)
        totals.append(part_g.sum(dims))
        projections.append((part_g * (part_x - _per_channel(center, x))).sum(dims))
    shape = center.shape
    return torch.stack(totals).sum(0).view(shape), torch.stack(projections).sum(0).view(shape)


def _input_gradient(
    g: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    epilogue: Epilogue,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    dtype = compute_dtype(x)
    center, scale, slope, offset = (
        _per_channel(c.to(dtype), x) for c in (*coefficients[:2], slope, offset)
    )
    dx = torch.addcmul(g + offset, x - center, slope) * scale
    if epilogue.mask is not None:
        dx = dx.where(epilogue.mask, 0)
    return dx.to(x.dtype).flatten(0, 1)


def _chunks(x: Tensor, other: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut x, and what goes with it, along samples and positions into chunks by shape alone."""
    limit = SINGLE_CHUNK if x.shape[0] * x.shape[2] == 1 else CHUNK
    # a traced graph is unrolled; there the compiler decides how to sum
    if torch.compiler.is_compiling() or x.numel() <= limit:
        yield x, other
        return
    dim = next((d for d in _reduced(x) if x.shape[d] > 1), None)
    if dim is None:  # one value a channel: nothing is summed
        yield x, other
        return
    step = max(1, x.shape[dim] * limit // x.numel())
    others = [other] * -(-x.shape[dim] // step) if other is None else other.split(step, dim)
    for part, part_other in zip(x.split(step, dim), others, strict=True):
        yield from _chunks(part, part_other)

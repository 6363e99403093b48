"""The backward pass in two halves, for those who must ask others in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.operation import epilogue_of, is_plain, laid_out_like
from batchnorm.functional.recipe import Normalization, Settings
from batchnorm.kernels import (
    Epilogue,
    Sums,
    accumulator,
    backend_for,
    coefficients_of,
    reference,
)
from batchnorm.moments import Moments

__all__ = ["input_gradient", "residual_gradient", "sums_of"]

_HOW = (
    "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor count, "
    "Tensor mean, Tensor m2, bool frozen, int groups, float eps, str act, float parameter"
)


def sums_of(dy: Tensor, how: Normalization) -> tuple[Sums, Tensor | None]:
    """Σg and Σg·(x − mean) of a normalization, (c,), and g itself where it keeps a residual.

    g is dy taken through the activation, (n, c, *p). Under autograd both are differentiable.
    """
    if not torch.is_grad_enabled() and not is_plain(dy, how.x, how.residual):
        total, projection, g = torch.ops.batchnorm.backward_sums(dy, *_flat(how))
        return Sums(total, projection), None if how.residual is None else g
    return _sums(dy, how)


def input_gradient(dy: Tensor, g: Tensor | None, how: Normalization, sums: Sums) -> Tensor:
    """That of x, (n, c, *p), from the sums over all data that share the moments.

    - `g`: as `sums_of` gave it.
    """
    if not torch.is_grad_enabled() and not is_plain(dy, how.x, how.residual):
        dx: Tensor = torch.ops.batchnorm.backward_input(dy, g, *_flat(how), *sums)
        return dx
    return _input(dy, g, how, sums)


def residual_gradient(
    dy: Tensor, g: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """That of a residual of `dtype`; dy itself where nothing but the mask came after it."""
    if dtype is None or g is not None:
        return g
    return (dy if mask is None else dy.where(mask.unsqueeze(1), 0)).to(dtype)


def _sums(dy: Tensor, how: Normalization) -> tuple[Sums, Tensor | None]:
    epilogue = _epilogue(how)
    coefficients = coefficients_of(how.x, how.moments, how.weight, how.bias, how.settings.eps)
    backend = reference if torch.is_grad_enabled() else backend_for(how.x, epilogue)
    total, about_center, g = backend.backward_reduce(dy, how.x, coefficients, epilogue)
    if g is not None and how.residual is not None:
        g = laid_out_like(how.residual, g.to(how.residual.dtype))
    return Sums.of(total, about_center, coefficients, how.moments), g


def _input(dy: Tensor, g: Tensor | None, how: Normalization, sums: Sums) -> Tensor:
    epilogue = _epilogue(how)
    if g is not None:  # the activation is behind it
        dy, epilogue = g, Epilogue(mask=epilogue.mask)
    coefficients = coefficients_of(how.x, how.moments, how.weight, how.bias, how.settings.eps)
    backend = reference if torch.is_grad_enabled() else backend_for(how.x, epilogue)
    slope, offset = sums.slope_and_offset(coefficients, how.moments, how.settings.eps)
    dx = backend.backward_apply(dy, how.x, coefficients, epilogue, slope, offset)
    return laid_out_like(how.x, dx)


def _epilogue(how: Normalization) -> Epilogue:
    return epilogue_of(how.residual, how.mask, how.settings.act, how.settings.parameter)


def _flat(how: Normalization) -> tuple[Any, ...]:
    m = how.moments
    tensors = (how.x, how.residual, how.mask, how.weight, how.bias, m.count, m.mean, m.m2)
    return *tensors, *how.settings


def _how(*flat: Any) -> Normalization:
    x, residual, mask, weight, bias, *moments = flat[:8]
    return Normalization(Moments(*moments), Settings(*flat[8:]), x, residual, mask, weight, bias)


@torch.library.custom_op(
    "batchnorm::backward_sums",
    mutates_args=(),
    schema=f"(Tensor dy, {_HOW}) -> (Tensor, Tensor, Tensor)",
)
@torch.no_grad()
def _registered_sums(dy: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    (total, projection), g = _sums(dy, _how(*flat))
    return total, projection, dy.new_empty(0) if g is None else g


@_registered_sums.register_fake
def _(dy: Tensor, x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape[1:2], dtype=accumulator(x))
    g = dy.new_empty(0) if residual is None else torch.empty_like(residual)
    return total, torch.empty_like(total), g


@torch.library.custom_op(
    "batchnorm::backward_input",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? g, {_HOW}, Tensor total, Tensor projection) -> Tensor",
)
@torch.no_grad()
def _registered_input(dy: Tensor, g: Tensor | None, *flat: Any) -> Tensor:
    *how, total, projection = flat
    return _input(dy, g, _how(*how), Sums(total, projection))


@_registered_input.register_fake
def _(dy: Tensor, g: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)

"""The same normalization in PyTorch's own operations, for those who must see inside.

torch.func and forward-mode differentiation need rules for every operation they meet, and an
exported program has to run where this library is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.functional.checks import is_traced
from batchnorm.functional.operation import epilogue_of
from batchnorm.kernels import Activation, compute_dtype, reference
from batchnorm.moments import Moments

__all__ = ["batch_norm", "is_asked_for", "moments", "normalize"]


def is_asked_for() -> bool:
    """Whether the caller is a transform, a forward-mode level, a tracer or an exporter."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or is_traced()
    )


def moments(x: Tensor, mask: Tensor | None, groups: int) -> Moments:
    """Count, mean and m2, (*groups, c), as constants."""
    return reference.moments(x.detach(), None if mask is None else mask.unsqueeze(1), groups)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    groups: int,
    eps: float,
    act: Activation,
) -> tuple[Tensor, Moments]:
    """y normalized by the batch's own moments, and those, (*groups, c), as constants."""
    epilogue = epilogue_of(residual, mask, act.name, act.parameter)
    y, batch = reference.forward(x, weight, bias, eps, epilogue, groups)
    return y, batch.detach()


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    act: Activation,
) -> Tensor:
    """y normalized by constants, in the one operation that exporters and folding tools know."""
    # the operation wants one dtype for all, and half precision is computed in float32
    wide = compute_dtype(x)
    y = F.batch_norm(
        _as(x, wide),
        _as(mean, wide),
        _as(var, wide),
        None if weight is None else _as(weight, wide),
        None if bias is None else _as(bias, wide),
        eps=eps,
    )
    dtype = x.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
        y = y + residual
    y = act(y)
    if mask is not None:
        y = y.where(mask.unsqueeze(1), 0)
    return _as(y, dtype)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where that changes something: an exported graph shows every cast."""
    return x if x.dtype == dtype else x.to(dtype)

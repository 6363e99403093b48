"""The same normalization in PyTorch's own operations, for those who must see inside.

torch.func and forward-mode differentiation need rules for every operation they meet, and an
exported program has to run where this library is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.functional.checks import is_traced
from batchnorm.functional.operation import epilogue_of, grouped
from batchnorm.kernels import Activation, reference
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
    """Count, mean and m2, (groups, c), as constants."""
    epilogue = epilogue_of(None, mask, groups, "identity", 0.0)
    return reference.moments(grouped(x.detach(), groups), epilogue.mask)


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
    """y normalized by the batch's own moments, and those, (groups, c), as constants."""
    epilogue = epilogue_of(residual, mask, groups, act.name, act.parameter)
    y, batch = reference.forward(grouped(x, groups), weight, bias, eps, epilogue)
    return y.flatten(0, 1), batch.detach()


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
    if x.dtype == torch.float64:  # PyTorch's takes no narrower statistics beside it
        mean, var = mean.double(), var.double()
        weight, bias = (None if t is None else t.double() for t in (weight, bias))
    y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    y = act(y if residual is None else y + residual)
    return y if mask is None else y.where(mask.unsqueeze(1), 0)

"""The weights of a linear module that do what affine maps before and behind it would do.

All in float64 on the CPU, whatever the model is in; rounded once, at the end.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from batchnorm.models.affine import Affine

__all__ = [
    "Linear",
    "Transposed",
    "channels_given",
    "channels_taken",
    "folded_parameters",
]

Linear: TypeAlias = nn.modules.conv._ConvNd | nn.Linear
"""What is linear in its weight: convolutions, transposed ones, linear layers."""

Transposed = nn.modules.conv._ConvTransposeNd


@torch.inference_mode(False)  # where nothing could learn that is made
def folded_parameters(
    module: Linear, taken: Affine, given: Affine
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias with which a linear module computes given(module(taken(x))).

    weight = given.scale·W·taken.scale, bias = given.scale·(b + Σ W·taken.shift) + given.shift

    Rounded to the weight's dtype, in its layout, on its device; subnormal numbers, which slow
    some processors down, become zeros. No bias where there was none and none is needed.
    """
    old, bias = module.weight, module.bias
    weight = _wide(old)
    constant = _sums(weight * _along(taken.shift, module, weight, taken=True), module)
    if bias is not None:
        constant = constant + _wide(bias)
    weight = weight * _along(taken.scale, module, weight, taken=True)
    weight = weight * _along(given.scale, module, weight, taken=False)
    constant = given.scale * constant + given.shift
    new = nn.Parameter(_rounded(weight, torch.empty_like(old)), old.requires_grad)
    if bias is None and not constant.any():
        return new, None
    learned = (old if bias is None else bias).requires_grad
    return new, nn.Parameter(_rounded(constant, old.new_empty(len(constant))), learned)


def channels_taken(module: Linear) -> int:
    """How many channels, or features, a linear module takes."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def channels_given(module: Linear) -> int:
    """How many channels, or features, a linear module gives."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _along(values: Tensor, module: Linear, weight: Tensor, *, taken: bool) -> Tensor:
    """Values of the channels that a module takes, or gives, where its weight has these."""
    # (out, in / groups, *kernel); transposed convolutions: (in, out / groups, *kernel)
    if taken is isinstance(module, Transposed):  # the first dimension has them all
        return values.view(-1, *[1] * (weight.ndim - 1))
    each = values.view(_groups(module), -1).repeat_interleave(
        weight.shape[0] // _groups(module), dim=0
    )
    return each.view(*each.shape, *[1] * (weight.ndim - 2))


def _sums(weight: Tensor, module: Linear) -> Tensor:
    """The sum of a weight over all but the channels that the module gives."""
    sums = weight.sum(list(range(2, weight.ndim))) if weight.ndim > 2 else weight
    if isinstance(module, Transposed):
        return sums.view(_groups(module), -1, sums.shape[1]).sum(1).flatten()
    return sums.sum(1)


def _groups(module: Linear) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _rounded(values: Tensor, into: Tensor) -> Tensor:
    into = into.detach().copy_(values)
    if into.dtype is torch.float16:  # its subnormals are weights as others, and not slow
        return into
    return into.masked_fill_(into.abs() < torch.finfo(into.dtype).tiny, 0)

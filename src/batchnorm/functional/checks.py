"""What a normalization's tensors must satisfy, said once, at the public edge."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["check_input", "is_traced"]


def is_traced() -> bool:
    """Whether torch.jit.trace is recording: sizes are tensors then, and were checked before."""
    return torch._C._get_tracing_state() is not None


def check_input(
    x: Tensor,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    batch: Moments | None = None,
    **channelwise: Tensor | None,
) -> None:
    """Raise unless x is floating point of (n, c, *positions) and everything else fits it."""
    if is_traced():
        return
    if not x.is_floating_point():
        raise TypeError(
            f"batch_norm needs a floating point input, got {x.dtype}; convert it first, "
            "for example with input.float()"
        )
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(
            f"batch_norm needs an input of shape (n, c, *positions), got shape {shape}; "
            "add the missing dimension, for example with input.unsqueeze(0)"
        )
    for name, tensor in channelwise.items():
        if tensor is not None and tuple(tensor.shape) != shape[1:2]:
            raise ValueError(
                f"{name} must hold one value per channel, shape ({shape[1]},) for an input of "
                f"shape {shape}, got shape {tuple(tensor.shape)}; channels are dimension 1"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on device {tensor.device} and the input on {x.device}; move one of "
                "them, for example with model.to(input.device)"
            )
    for name, tensor in (("residual", residual), ("mask", mask)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on device {tensor.device} and the input on {x.device}; move it there"
            )
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(
            f"residual must have the input's shape {shape}, got {tuple(residual.shape)}; "
            "project it or expand() it first"
        )
    if mask is not None:
        expected = (shape[0], *shape[2:])
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be of dtype bool, true where the data is, got {mask.dtype}; "
                "compare first, for example mask != 0"
            )
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"mask must have shape (n, *positions) = {expected} for an input of shape "
                f"{shape}, got {tuple(mask.shape)}; it has no channel dimension"
            )
    if groups < 1 or shape[0] % groups:
        raise ValueError(
            f"groups must divide the batch into equal slices, got {groups} groups for "
            f"{shape[0]} samples"
        )
    if batch is not None:
        expected = shape[1:2] if groups == 1 else (groups, shape[1])
        for name in ("count", "mean", "m2"):
            statistic = getattr(batch, name)
            if tuple(statistic.shape) != expected or statistic.device != x.device:
                raise ValueError(
                    f"batch.{name} must have shape {expected} on {x.device} for an input of shape "
                    f"{shape} in {groups} groups, got {tuple(statistic.shape)} on "
                    f"{statistic.device}; take the moments with the same groups"
                )

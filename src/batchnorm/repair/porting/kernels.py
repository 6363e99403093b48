"""The layouts of kernels: channels last in Keras and Flax, first in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchnorm.repair.porting.sources import FLAX, KERAS, Source

__all__ = ["LINEAR", "channels_first", "is_kernel", "kind_of_kernel", "turned"]

LINEAR = "linear layer"


def is_kernel(last: str, value: Tensor) -> bool:
    """Whether a value of this last name is a kernel of a layer that PyTorch has too."""
    return last in ("kernel", "depthwise_kernel") and 2 <= value.ndim <= 5


def kind_of_kernel(
    path: str, last: str, kernel: Tensor, module: nn.Module | None, source: Source
) -> str:
    """Which layer a kernel is of: the module says, or without one the path.

    Keras calls the kernels of convolutions and of depthwise ones alike, and Flax's transposed
    convolutions are mirrored.
    """
    if kernel.ndim == 2:
        return LINEAR
    name = path.rpartition(".")[2].lower()
    if isinstance(module, _ConvNd):
        is_transposed = isinstance(module, _ConvTransposeNd)
        is_depthwise = 1 < module.groups == module.in_channels == kernel.shape[-2]
    else:
        is_transposed, is_depthwise = "transpose" in name, "depthwise" in name
    if is_transposed:
        return "transposed convolution"
    if source is KERAS and (last == "depthwise_kernel" or is_depthwise):
        return "depthwise convolution"
    return "convolution"


def turned(kernel: Tensor, kind: str, source: Source) -> Tensor:
    """A kernel in PyTorch's layout: (out, in, *positions), and transposed (in, out, *positions).

    - linear layer: (in, out).
    - convolution: (*positions, in / groups, out).
    - depthwise convolution: (*positions, in, multiplier), out = in · multiplier.
    - transposed convolution: (*positions, out, in) in Keras; (*positions, in, out) and mirrored
      in Flax, unless it was made with `transpose_kernel=True`, which is as Keras's.
    """
    if kind == "depthwise convolution":
        kernel = kernel.movedim((-2, -1), (0, 1)).flatten(0, 1).unsqueeze(1)
    elif kind == "transposed convolution" and source is FLAX:
        positions = tuple(range(2, kernel.ndim))
        kernel = kernel.movedim((-2, -1), (0, 1)).flip(positions)
    else:
        kernel = kernel.movedim((-1, -2), (0, 1))
    return kernel.contiguous()


def channels_first(name: str, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Features that were flattened from (*positions, channels), as if from (channels, *positions).

    Raises `ValueError` where the shape has another number of features.
    """
    if math.prod(shape) != values.shape[0]:
        raise ValueError(
            f"{name} has {values.shape[0]} features, which are not those of {tuple(shape)} "
            "flattened; pass the shape before the Flatten, (*positions, channels), without batch"
        )
    channels = len(shape) - 1
    apart = values.reshape(*shape, *values.shape[1:])
    return apart.movedim(channels, 0).flatten(0, channels)

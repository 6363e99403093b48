"""Batch normalization as functions: checked at the edge, one registered operation behind."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import TypedDict

from batchnorm.functional import composite, operation
from batchnorm.functional.checks import check_input
from batchnorm.functional.recipe import Settings
from batchnorm.kernels import NOTHING, Activation, accumulator, backend_for, reference
from batchnorm.moments import Moments

__all__ = ["Options", "batch_norm", "moments", "normalize", "track"]


class Options(TypedDict, total=False):
    """What every normalization takes beside its statistics; see `batch_norm`."""

    residual: Float[Tensor, "n c *positions"] | None
    mask: Bool[Tensor, "n *positions"] | None
    eps: float
    act: str | nn.Module | Activation | None


def moments(
    x: Float[Tensor, "n c *positions"],
    *,
    mask: Bool[Tensor, "n *positions"] | None = None,
    groups: int = 1,
) -> Moments:
    """The moments of each channel of x, (c,), or of each of `groups` equal slices, (groups, c).

    Computed in float64 (float32 on a device without it) and not differentiable.
    """
    check_input(x, mask=mask, groups=groups)
    if composite.is_asked_for():
        return composite.moments(x, mask, groups)
    return operation.moments(x.detach(), mask, groups)


def batch_norm(
    x: Float[Tensor, "n c *positions"],
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    *,
    batch: Moments | None = None,
    groups: int = 1,
    residual: Float[Tensor, "n c *positions"] | None = None,
    mask: Bool[Tensor, "n *positions"] | None = None,
    eps: float = 1e-5,
    act: str | nn.Module | Activation | None = None,
) -> tuple[Float[Tensor, "n c *positions"], Moments]:
    """Normalize each channel by the batch's own moments.

    y = act(γ·(x − mean)/√(var + ε) + β + residual), var being the biased variance.

    ```python
    y, batch = batch_norm(x)                                      # (n, c, h, w), moments (c,)
    y, _ = batch_norm(x, weight, bias, act="relu", residual=skip)
    y, _ = batch_norm(x, mask=lengths[:, None] > torch.arange(x.shape[2]))   # x: (n, c, l)
    y, slices = batch_norm(x, groups=4)                           # moments (4, c)
    ```

    - `x`: floating point, in any strides.
    - `weight`, `bias`: γ and β; 1 and 0 where None.
    - `batch`: x's own moments, as `moments(x, …)` gave them, where they are known already.
      Gradients run through them all the same.
    - `groups`: slices of the batch that are normalized apart (ghost batches).
    - `residual`: added before the activation.
    - `mask`: true where the data is. Masked elements do not count, get no gradient, and come
      out as zeros. How many are left is not looked at, which would wait for the device: a single
      one comes out as β, as its own mean.
    - `act`: a name among `batchnorm.kernels.ACTIVATIONS`, or a `torch.nn` module of those.

    Returns y, in x's layout, and the batch's moments, which are constants to autograd.

    Raises `ValueError` for shapes that do not fit each other and for eps ≤ 0, `TypeError` for
    an input that is not floating point.

    Source: Ioffe & Szegedy 2015, "Batch normalization", algorithm 1.
    """
    activation = Activation.of(act)
    check_input(
        x, weight=weight, bias=bias, residual=residual, mask=mask, groups=groups, batch=batch
    )
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if composite.is_asked_for():
        return composite.batch_norm(x, weight, bias, residual, mask, groups, eps, activation)
    settings = Settings(False, groups, eps, activation.name, activation.parameter)
    return operation.normalize(x, residual, mask, weight, bias, batch, settings)


def normalize(
    x: Float[Tensor, "n c *positions"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    *,
    residual: Float[Tensor, "n c *positions"] | None = None,
    mask: Bool[Tensor, "n *positions"] | None = None,
    eps: float = 1e-5,
    act: str | nn.Module | Activation | None = None,
) -> Float[Tensor, "n c *positions"]:
    """Normalize each channel by given statistics, which are constants: inference, frozen layers.

    y = act(γ·(x − mean)/√(var + ε) + β + residual)

    Arguments and errors are those of `batch_norm`; here ε may be 0.

    Source: Ioffe & Szegedy 2015, "Batch normalization", algorithm 2.
    """
    activation = Activation.of(act)
    check_input(x, mean=mean, var=var, weight=weight, bias=bias, residual=residual, mask=mask)
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if composite.is_asked_for():
        return composite.normalize(x, mean, var, weight, bias, residual, mask, eps, activation)
    # as the CPU's kernels read them; the GPU's take any, and a conversion would be a launch
    wide = None if x.is_cuda else accumulator(x)
    constants = Moments.constant(operation.constant(mean, wide), operation.constant(var, wide))
    settings = Settings(True, 1, eps, activation.name, activation.parameter)
    return operation.normalize(x, residual, mask, weight, bias, constants, settings)[0]


def track(
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    batches: Int[Tensor, ""] | None,
    batch: Moments,
    momentum: float | None,
) -> None:
    """Move running statistics in place towards a batch's, without waiting for its values.

    running ← (1 − momentum)·running + momentum·batch, with the batch's unbiased variance.

    - `mean`, `var`: the running ones, which change.
    - `batches`: how many were tracked; counts this one.
    - `momentum`: the share of the batch; None for the average of all batches.

    A batch with a non-finite mean or variance is skipped whole, counter included.

    Raises `ValueError` where the batch, or one of the running statistics, is on another device.
    """
    if var.device != mean.device:
        raise ValueError(
            f"the running mean is on device {mean.device} and the running variance on "
            f"{var.device}; move the layer as a whole, with layer.to(device)"
        )
    if batch.mean.device != mean.device:
        raise ValueError(
            f"the running statistics are on device {mean.device} and the batch on "
            f"{batch.mean.device}; move one of them, for example with model.to(input.device)"
        )
    if operation.is_plain(mean, var, batches, batch.mean) and not composite.is_asked_for():
        backend_for(mean, NOTHING).track(mean, var, batches, batch, momentum)
        return
    with torch.no_grad():
        reference.track(mean, var, batches, batch, momentum)

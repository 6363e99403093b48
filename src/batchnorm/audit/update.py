"""The moments of a batch, from what a training pass did to the running statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.audit.call import Call
from batchnorm.audit.synchronizing import asked
from batchnorm.moments import Moments

__all__ = ["Direct", "Update", "direct", "update"]


class Update(NamedTuple):
    """What one training pass did to the running mean and variance.

    new = (1 − m)·old + m·batch, so batch = old + (new − old)/m: exact for masks, ghost slices
    and several ranks too, and without a look at n·c·positions values. It is worked out when
    somebody asks; a pass of training only copies.
    """

    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    momentum: float | Tensor
    values: int  # a channel

    def moments(self) -> Moments:
        """The batch's own moments, in float64 on the CPU."""
        (mean, var), (new_mean, new_var) = (
            [t.double().cpu() for t in pair] for pair in (self.old, self.new)
        )
        m = self.momentum.double().cpu() if isinstance(self.momentum, Tensor) else self.momentum
        n = torch.full_like(mean, self.values, dtype=torch.int64)
        batch_var = var + (new_var - var) / m
        # what rounding could have left of a variance of 0 is none
        rounding = 4 * torch.finfo(self.old[1].dtype).eps * torch.maximum(var, new_var) / m
        batch_var = batch_var.where(batch_var > rounding, 0)
        return Moments(n, mean + (new_mean - mean) / m, batch_var * (n - 1))


class Direct(NamedTuple):
    """The moments of the input itself, where the running statistics do not tell them."""

    own: Moments

    def moments(self) -> Moments:
        """The batch's moments, in float64 on the CPU."""
        return Moments(
            self.own.count.cpu(), self.own.mean.double().cpu(), self.own.m2.double().cpu()
        )


# Compiled layers do not show their input. With so many values a variance is as good as unbiased.
_UNTOLD = 2**20


def update(call: Call, old: tuple[Tensor, Tensor]) -> Update | Direct | None:
    """A batch that a pass has moved the `old` statistics by; None where nothing tells of it."""
    layer, x = call.layer, call.input
    m: float | Tensor | None = layer.momentum
    if m is None and layer.num_batches_tracked is not None:
        m = 1 / layer.num_batches_tracked
    new = call.running_statistics()
    # half precision rounds the step away; a momentum of 0 makes none
    if m is None or layer.momentum == 0 or old[0].dtype.itemsize < 4 or new is None:
        alone = x is not None and asked(layer) is None  # else it is a part of the batch
        return direct(x) if x is not None and alone else None
    return Update(old, new, m, _UNTOLD if x is None else x.numel() // x.shape[1])


def direct(x: Tensor) -> Direct:
    """A batch of which the input is at hand, (n, c, *positions)."""
    return Direct(Moments.of(x.detach(), (0, *range(2, x.ndim))))

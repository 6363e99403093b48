"""One forward pass through one batch norm layer, as the rules see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from batchnorm.layers import BatchNorm
from batchnorm.statistics import Running, Statistics

__all__ = ["Call", "TorchBatchNorm"]

TorchBatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Call:
    """A call of `layer`, known as `path` in its model.

    - `input`: where it came by position; PyTorch shows global hooks nothing else.
    - `has_gradients`: whether autograd was recording.
    """

    layer: TorchBatchNorm
    path: str
    input: Tensor | None
    has_gradients: bool

    @property
    def policy(self) -> Statistics | None:
        """This library's statistics policy; None for `torch.nn`'s layers."""
        return self.layer.statistics if isinstance(self.layer, BatchNorm) else None

    @property
    def normalizes_with_batch(self) -> bool:
        """Whether the layer computes statistics of this input."""
        if self.layer.training:
            return not isinstance(self.policy, Running)
        return self.layer.running_mean is None and self.layer.running_var is None

    @property
    def tracks(self) -> bool:
        """Whether the layer moves its running statistics in this call."""
        return (
            self.layer.training
            and self.layer.track_running_stats
            and self.layer.running_mean is not None
            and not isinstance(self.policy, Running)
        )

    @property
    def smallest_slice(self) -> int | None:
        """Values per channel in the smallest set that shares statistics."""
        if self.input is None or self.input.ndim < 2:
            return None
        n = self.input.shape[0]
        samples = n if self.policy is None else self.policy.smallest_slice(n)
        return samples * self.input.shape[2:].numel()

    @property
    def statistics_version(self) -> int:
        """A number that changes whenever the running mean is written; −1 without one."""
        mean = self.layer.running_mean
        # a tensor made in inference mode keeps no version
        return -1 if mean is None or mean.is_inference() else mean._version

"""One forward pass through one batch norm layer, as the rules see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from batchnorm.layers import BatchNorm
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.statistics import Running, Statistics

__all__ = ["Call", "batches_version", "policy_of"]


@dataclass(slots=True)
class Call:
    """A call of `layer`, which is the probe's `number`th and lies at `path` in its model.

    - `input`: where it came by position; PyTorch shows global hooks nothing else, and of a
      compiled layer not even that.
    - `has_gradients`: whether autograd was recording.
    - `root`: the model.
    - `output`: after the pass.
    - `notes`: what a rule puts down under its code before the pass, to read it after the pass.
    """

    layer: TorchBatchNorm
    number: int
    path: str
    input: Tensor | None
    has_gradients: bool
    root: nn.Module
    notes: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None
    tracks: bool = field(init=False)
    """Whether the layer moves its running statistics in this call."""

    def __post_init__(self) -> None:
        layer = self.layer
        # straight from the dictionaries: this runs in every pass of somebody's training
        self.tracks = (
            layer.training
            and layer.track_running_stats
            and layer._buffers["running_mean"] is not None
            and getattr(layer.__dict__.get("statistics"), "updates", True)
        )

    @property
    def policy(self) -> Statistics | None:
        """See `policy_of`."""
        return policy_of(self.layer)

    @property
    def normalizes_with_batch(self) -> bool:
        """Whether the layer computes statistics of this input."""
        if self.layer.training:
            return not isinstance(self.policy, Running)
        return self.layer.running_mean is None and self.layer.running_var is None

    @property
    def smallest_slice(self) -> int | None:
        """Values per channel in the smallest set that shares statistics."""
        x, policy = self.input, self.policy
        if x is None or x.ndim < 2:
            return None
        in_slices = policy is not None and self.layer.training
        samples = policy.smallest_slice(x.shape[0]) if policy and in_slices else x.shape[0]
        return samples * x.shape[2:].numel()

    def running_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Copies of the running mean and variance; None where there are none."""
        mean, var = self.layer.running_mean, self.layer.running_var
        return None if mean is None or var is None else (mean.clone(), var.clone())

    def batches_version(self) -> int | None:
        """See `batches_version`."""
        return batches_version(self.layer)


def policy_of(layer: nn.Module) -> Statistics | None:
    """This library's statistics policy; None for `torch.nn`'s layers."""
    return layer.statistics if isinstance(layer, BatchNorm) else None


def batches_version(layer: nn.Module) -> int | None:
    """A number that grows whenever a layer's count of batches is written; None without one.

    Every training pass writes it. (PyTorch's kernels move the running mean itself unseen.)
    """
    batches = layer._buffers.get("num_batches_tracked")
    return None if batches is None or batches.is_inference() else batches._version

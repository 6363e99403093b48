"""Lazy forms: num_features is read off the first input, and the layer becomes an ordinary one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.kernels import Activation
from batchnorm.layers.base import BatchNorm, checked_statistics
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.statistics import Statistics

__all__ = ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]


class _Lazy(nn.modules.batchnorm._LazyNormBase, BatchNorm):
    """What the lazy forms take beyond `torch.nn`'s: `bias`, `act` and `statistics`."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | nn.Module | Activation | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.act = Activation.of(act)
        self.statistics = checked_statistics(statistics, track_running_stats)

    def initialize_parameters(self, input: Tensor, **_: Tensor | None) -> None:
        """Take num_features from dimension 1 of the first input."""
        super().initialize_parameters(input)
        self.num_features = input.shape[1]  # torch's leaves 0 where a state_dict came first
        self._keep_statistics_wide()


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d, BatchNorm1d):
    """A `BatchNorm1d` that reads `num_features` off its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d, BatchNorm2d):
    """A `BatchNorm2d` that reads `num_features` off its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d, BatchNorm3d):
    """A `BatchNorm3d` that reads `num_features` off its first input."""

    cls_to_become = BatchNorm3d

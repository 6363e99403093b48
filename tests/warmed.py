"""Imported before processes are forked: what each of them would load for seconds."""

from __future__ import annotations

import torch
import torch._dynamo  # DistributedDataParallel imports it
from torch import Tensor

from batchnorm import BatchNorm2d
from batchnorm.functional import synchronized_batch_norm
from batchnorm.moments import Moments


class _Alone:
    def merged(self, mine: Moments) -> Moments:
        return mine

    def total(self, sums: Tensor) -> Tensor:
        return sums


torch.set_num_threads(1)  # a forked process has no other thread
for _dtype in (torch.float32, torch.float64):
    for _act in (None, "relu"):
        _x = torch.randn(2, 2, 3, 3, dtype=_dtype, requires_grad=True)
        _y, _ = synchronized_batch_norm(_x, peers=_Alone(), act=_act)  # type: ignore[arg-type]
        _y.sum().backward()
        _norm = BatchNorm2d(2, act=_act, dtype=_dtype)
        for _mode in (True, False):
            _norm.train(_mode)(_x).sum().backward()

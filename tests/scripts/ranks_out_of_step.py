"""torchrun: the second rank has a batch less than the first, whose layers wait for it."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm1d, Sync

Norm = partial(BatchNorm1d, statistics=Sync())

dist.init_process_group("gloo", timeout=timedelta(seconds=30))
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), Norm(8), nn.ReLU(), nn.Linear(8, 8), Norm(8))
model = DistributedDataParallel(model)
if rank == 0:
    with torch.no_grad():
        model.module.eval()(torch.randn(3, 4))  # alone, which nobody waits for
        model.train()
for _ in range(28 - rank):  # the mistake
    model(torch.randn(6, 4)).square().sum().backward()

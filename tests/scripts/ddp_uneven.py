"""torchrun: the second rank's batch has a single sample, and the first waits for its gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
x = torch.randn(4 if dist.get_rank() == 0 else 1, 3)
model(x).sum().backward()  # the mistake

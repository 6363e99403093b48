"""torchrun: each rank keeps the statistics of its own shard, and evaluates with them.

The second also forgets eval() once, and on a PyTorch whose broadcast writes over what a backward
pass needs, both call a model twice before it.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.audit.rules import bn111_two_forwards
from batchnorm.ranks.store import Board, Patience

bn111_two_forwards.is_affected = lambda: True  # as older versions are


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(Net())
model.broadcast_buffers = False
twice = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
torch.manual_seed(rank)
shift = float(sys.argv[1]) * rank
for _ in range(30):
    x, y = torch.randn(16, 4) + shift, torch.randint(2, (16,))
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
first, second = twice(x), twice(-x)  # on older versions the mistake
(first.sum() + second.sum()).backward()
with torch.no_grad():
    if rank == 1:
        model(x)  # the mistake
    model.eval()(x)
    twice.module.eval()(x)  # not through the wrapper, which would write rank 0's
print(f"rank {rank} has ended")
dist.destroy_process_group()
if rank == 1:  # what it ends with makes torchrun end the first one, which has to be done by then
    Board.of_torchrun("run").collect("note", Patience(60.0), [0])
sys.exit(3 * rank)

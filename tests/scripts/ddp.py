"""torchrun: data-parallel training, validated as it should be and then without eval()."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from batchnorm import BatchNorm2d

EPOCHS = 3


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, bias=False),
            BatchNorm2d(6, act="relu"),
            nn.Flatten(),
            nn.Linear(6 * 4 * 4, 4),
        )


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
data = TensorDataset(torch.randn(512, 1, 8, 8), torch.randint(4, (512,)))
sampler = DistributedSampler(data, seed=1)
loader = DataLoader(data, batch_size=16, sampler=sampler)
right, wrong = DistributedDataParallel(Net()), DistributedDataParallel(Net())
left = {}
for name, model in {"right": right, "wrong": wrong}.items():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if model is right:
            model.eval()
        with torch.no_grad():
            for x, y in loader:
                losses.append(F.cross_entropy(model(x), y))  # the mistake
    left |= {f"{name} {key}": value for key, value in model.state_dict().items()}
    left[f"{name} losses"] = torch.stack(losses)
left["random state"] = torch.get_rng_state()
torch.save(left, f"{sys.argv[1]}.{rank}")
if rank == 0:
    print(f"{dist.get_world_size()} ranks, loss {losses[-1].item()}")
dist.destroy_process_group()

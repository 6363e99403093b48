"""torch.compile with two backends, and a model beside them that is not compiled."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm1d


class Net(nn.Sequential):
    def __init__(self, norm: type[nn.Module]):
        super().__init__(nn.Linear(8, 16, bias=False), norm(16), nn.ReLU(), nn.Linear(16, 4))


class Eager(Net):
    pass


def train(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        x, y = torch.randn(32, 8), torch.randint(4, (32,))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(F.cross_entropy(model(x), y))  # the mistake
    return torch.stack(losses)


torch.manual_seed(0)
left = {}
for backend, norm in {"aot_eager": BatchNorm1d, "inductor": nn.BatchNorm1d}.items():
    model = Net(norm)
    left[f"{backend} losses"] = train(torch.compile(model, backend=backend, fullgraph=True))
    left |= {f"{backend} {key}": value for key, value in model.state_dict().items()}
left["eager losses"] = train(Eager(nn.BatchNorm1d))
left["random state"] = torch.get_rng_state()
torch.save(left, sys.argv[1])

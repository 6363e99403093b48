"""Batches from two worker processes, forked and then spawned; the last one has a single sample."""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info


class Samples(Dataset):
    """What spawned workers have to unpickle."""

    def __init__(self):
        self.parent = os.getpid()

    def __len__(self):
        return 33

    def __getitem__(self, i):
        if os.getpid() == self.parent:
            raise RuntimeError("not in a worker")
        return get_worker_info().id + torch.randn(8), i % 2  # random by the worker's own seed


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loaders = (
        DataLoader(
            Samples(),
            batch_size=8,
            shuffle=True,
            num_workers=2,
            multiprocessing_context=context,
            drop_last=drop_last,
        )
        for context, drop_last in (("fork", True), ("spawn", False))
    )
    try:
        for loader in loaders:
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)  # the mistake: drop_last=False
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        torch.save(model.state_dict() | {"random state": torch.get_rng_state()}, sys.argv[1])


if __name__ == "__main__":
    main()

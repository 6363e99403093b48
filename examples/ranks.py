"""Train the network of `digits.py` on several ranks, with statistics of their own or shared ones.

    torchrun --nproc-per-node 2 examples/ranks.py
    torchrun --nproc-per-node 2 examples/ranks.py --sync
    torchrun --nproc-per-node 2 examples/ranks.py --reduce

Each rank has the digits of some classes, as a device has its owner's data. That is the hard case
for statistics that are not shared: what a rank learns of mean and variance is not what the others
learn, and no rank has seen what inference will show.
"""

from __future__ import annotations

import argparse
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import Loader, ResidualNetwork, load, validate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import convert, reduce_statistics


def shard(whole: TensorDataset, rank: int, world: int) -> Loader:
    """The classes of this rank, in batches of 16; each rank has as many batches as the others."""
    images, labels = whole.tensors
    mine = labels % world == rank
    fewest = min(int((labels % world == r).sum()) for r in range(world))
    data = TensorDataset(images[mine][:fewest], labels[mine][:fewest])
    return DataLoader(data, batch_size=16, shuffle=True, drop_last=True)


def distributed(model: nn.Module) -> DistributedDataParallel:
    """Gradients averaged over the ranks; the statistics are not to be overwritten with rank 0's."""
    name = "forward_sync_buffers"  # since PyTorch 2.13
    if name not in signature(DistributedDataParallel).parameters:
        name = "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sync", action="store_true", help="share statistics in training")
    parser.add_argument("--reduce", action="store_true", help="merge running statistics after it")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResidualNetwork()
    if args.sync:
        convert(model, to="sync")
    train_set, test_set = load()
    loader = shard(train_set, rank, world)
    wrapped = distributed(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()
    if args.reduce:
        reduced = reduce_statistics(wrapped)
        if rank == 0:
            print(reduced)
    accuracy = validate(model, DataLoader(test_set, batch_size=60), forget_eval=False)
    print(f"rank {rank} of {world}: test accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

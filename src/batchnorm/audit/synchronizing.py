"""Layers that ask other ranks in a training-mode pass, and which ranks those are.

Nothing here makes a process group, which would be a collective.
"""

from __future__ import annotations

import sys
from types import MethodType

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.layers import BatchNorm
from batchnorm.models.norms import TorchBatchNorm, sync_of
from batchnorm.ranks import size_of
from batchnorm.statistics import Batch, Statistics, Sync, Untracked

__all__ = ["ask_nobody", "asked", "group_name", "is_sharded", "keep_apart", "ranks_of"]


def asked(layer: nn.Module) -> Sync | None:
    """With whom a layer normalizes in training mode; None where with nobody."""
    sync = sync_of(layer)
    if sync is None or size_of(None) == 1:
        return None
    if isinstance(layer, nn.SyncBatchNorm) and "forward" in layer.__dict__:
        return None  # whoever replaced it knows what it does
    size = size_of(sync.group) if sync.neighbours is None else sync.neighbours
    return sync if size > 1 else None


def group_name(sync: Sync) -> str:
    """What tells one group of ranks from others, the same on all of them."""
    if sync.neighbours is not None:
        return f"neighbours {sync.neighbours}"
    group = dist.group.WORLD if sync.group is None else sync.group
    return str(getattr(group, "group_name", ""))


def ranks_of(sync: Sync) -> tuple[int, ...]:
    """The numbers of the ranks that are asked."""
    k, world = sync.neighbours, size_of(None)
    if k is not None:
        first = dist.get_rank() // k * k
        return tuple(range(first, min(first + k, world)))
    return tuple(
        dist.get_process_group_ranks(dist.group.WORLD if sync.group is None else sync.group)
    )


def ask_nobody(model: nn.Module) -> None:
    """Have its layers normalize this rank's batches alone; who calls this puts the model back."""
    for layer in model.modules():
        if asked(layer) is None:
            continue
        if isinstance(layer, BatchNorm):
            layer.statistics = _local(layer.statistics)
        else:
            layer.forward = MethodType(TorchBatchNorm.forward, layer)


def keep_apart(model: nn.Module) -> None:
    """Have DistributedDataParallel send nothing to other ranks; who calls this puts it back."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.broadcast_buffers = False
            module.require_backward_grad_sync = False


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the parameters, and none can run it alone (FSDP)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by who shards
    kinds = tuple(
        kind
        for name in ("FSDPModule", "FullyShardedDataParallel")
        if (kind := getattr(fsdp, name, None)) is not None
    )
    return size_of(None) > 1 and any(isinstance(module, kinds) for module in model.modules())


def _local(policy: Statistics) -> Statistics:
    """What a policy does with this rank's batch alone."""
    if isinstance(policy, Untracked):
        return Untracked(_local(policy.policy))
    return (policy.slices or Batch()) if isinstance(policy, Sync) else policy

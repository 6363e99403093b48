"""Layers that ask other ranks in a training-mode pass, and which ranks those are."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from batchnorm.layers import BatchNorm
from batchnorm.statistics import Sync, Untracked

__all__ = ["asks_others", "asks_others_if_trained", "group_asked", "ranks_asked"]


def asks_others_if_trained(layer: nn.Module) -> bool:
    """Whether a layer's training-mode passes are collectives, by its kind."""
    if isinstance(layer, BatchNorm):
        return _sync_of(layer.__dict__.get("statistics")) is not None
    # one whose forward was replaced on the instance does what that does
    return isinstance(layer, nn.SyncBatchNorm) and "forward" not in layer.__dict__


def asks_others(layer: nn.Module) -> bool:
    """Whether a pass through a layer, in the mode that it is in, is a collective."""
    return layer.training and asks_others_if_trained(layer)


def group_asked(layer: nn.Module) -> dist.ProcessGroup | None:
    """The ranks whose batches a layer normalizes together in training mode; None for nobody."""
    if not (dist.is_available() and dist.is_initialized()) or not asks_others_if_trained(layer):
        return None
    policy = _sync_of(getattr(layer, "statistics", None))
    own: Any = layer.process_group if policy is None else policy.process_group
    group: dist.ProcessGroup | None = dist.group.WORLD if own is None else own
    return group if dist.get_world_size(group) > 1 else None


def ranks_asked(layer: nn.Module) -> tuple[int, ...]:
    """The numbers of these ranks; none for nobody."""
    group = group_asked(layer)
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def _sync_of(policy: object) -> Sync | None:
    policy = policy.policy if isinstance(policy, Untracked) else policy
    return policy if isinstance(policy, Sync) else None

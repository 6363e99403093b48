"""What layers that synchronize were given on all of their ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.synchronizing import asked, group_name
from batchnorm.moments import Moments
from batchnorm.statistics import Sync

__all__ = ["share_moments"]


def share_moments(model: nn.Module, evidence: Evidence) -> None:
    """Put the moments of each batch on all ranks in the place of this rank's.

    Of the layers that normalized them together; those that divide their batches into slices are
    left as they are. A collective, in which all ranks of these layers must have run as many
    batches.
    """
    layers = dict(model.named_modules())
    groups: dict[str, tuple[Sync, list[LayerEvidence]]] = {}
    for own in evidence.layers:
        sync = None if own.is_frozen else asked(layers[own.path])
        if sync is not None and sync.slices is None:
            groups.setdefault(group_name(sync), (sync, []))[1].append(own)
    for sync, those in groups.values():
        mine = [batch for own in those for batch in own.batches]
        shared = dict(zip(map(id, mine), _shared(mine, sync.process_group), strict=True))
        for own in those:
            own.batches = [shared[id(batch)] for batch in own.batches]
            for origin in own.origins.values():
                origin.batches = [shared[id(batch)] for batch in origin.batches]


def _shared(mine: Sequence[Moments], group: dist.ProcessGroup | None) -> list[Moments]:
    """Each merged with those of the other ranks: Chan's formula, by two sums over the ranks."""
    sizes = [len(batch.mean) for batch in mine]
    on_gpu = "nccl" in str(dist.get_backend(group))
    device = torch.device("cuda" if on_gpu else "cpu")
    n, mean, m2 = (
        torch.cat([getattr(batch, name).double() for batch in mine]).to(device)
        for name in ("count", "mean", "m2")
    )
    sums = torch.stack((n, n * mean))
    dist.all_reduce(sums, group=group)
    count, total = sums
    merged = total / count.clamp(min=1)
    m2 = m2 + n * (mean - merged).square()
    dist.all_reduce(m2, group=group)
    parts = (t.cpu().split(sizes) for t in (count.long(), merged, m2))
    return [Moments(*each) for each in zip(*parts, strict=True)]

"""What one rank knows of its layers, for rules that look at all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.wrapped import unwrapped
from batchnorm.ranks.naming import WRAPPERS

__all__ = [
    "Calls",
    "LayerView",
    "RankView",
    "RankViews",
    "Statistics",
    "digest",
    "name_of",
    "sequences_of",
    "told",
]

Statistics = tuple[Tensor, Tensor]
"""A running mean and variance, each (c,)."""


@dataclass(frozen=True)
class LayerView:
    """One layer on one rank; digests are empty for what is not there.

    - `path`: as this rank's report names it, after the module that was called first.
    - `name`: the same on ranks that called other modules first, or wrapped them.
    - `weights`: a digest of γ, which is the same on ranks that train one model.
    - `held`: of the running statistics at the end.
    - `used`: of those that it was last evaluated with, its `evaluations`th time.
    - `is_broadcast`: whether DistributedDataParallel writes rank 0's buffers over this rank's
      before it uses them.
    - `asks`: the ranks that it normalizes with in training mode; nobody, for most.
    - `is_training`: its flag, at its last call.
    - `learned_in_eval`: backward passes through it while it was in eval mode.
    """

    path: str
    name: str
    eps: float
    weights: str = ""
    held: str = ""
    used: str = ""
    evaluations: int = 0
    is_broadcast: bool = False
    asks: tuple[int, ...] = ()
    is_training: bool = True
    learned_in_eval: int = 0


@dataclass(frozen=True)
class Calls:
    """Training-mode calls of all layers that ask the same ranks, in their order.

    - `group`, `ranks`: the process group's name, and those in it.
    - `counts`: how many calls each layer had, by name.
    - `last`: the names, of the last calls.
    """

    group: str
    ranks: tuple[int, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    last: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Which group it is."""
        return self.group, self.ranks

    @property
    def count(self) -> int:
        """How many calls there were."""
        return sum(self.counts.values())

    def at(self, number: int) -> str | None:
        """Whose call it was, from 0 on; None for one that is forgotten, or has not come."""
        index = number - (self.count - len(self.last))
        return self.last[index] if 0 <= index < len(self.last) else None


@dataclass(frozen=True)
class RankView:
    """What one rank knows.

    - `status`: the exit status of its script; None where that had not ended.
    - `is_together`: whether all ranks looked at the same line of their script.
    - `is_evaluating`: whether its whole model is in eval mode.
    - `is_connected`: whether it had a process group with others.
    """

    rank: int
    layers: tuple[LayerView, ...] = ()
    calls: tuple[Calls, ...] = ()
    status: int | None = 0
    is_together: bool = False
    is_evaluating: bool = False
    is_connected: bool = True


@dataclass(frozen=True, eq=False)
class RankViews:
    """What the ranks know, of those that told.

    - `size`: how many ranks there are.
    - `statistics`: by digest, those of layers that differ between ranks; not all of them where
      there are very many ranks.
    """

    size: int
    views: Sequence[RankView]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)


def digest(*tensors: Tensor | None) -> str:
    """A few letters that are the same for the same bits; none for what has no values here."""
    state = blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is None or not _has_values(tensor):
            return ""
        values = tensor.detach().cpu().contiguous()
        state.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def told(statistics: Statistics | None) -> tuple[str, Statistics | None]:
    """Running statistics as other ranks get them, with their digest."""
    if statistics is None or not all(map(_has_values, statistics)):
        return "", None
    mean, var = (t.detach().float().cpu() for t in statistics)
    return digest(mean, var), (mean, var)


def name_of(root: nn.Module, path: str) -> str:
    """A layer's name, of its path in a model that ranks may have wrapped: `ResNet.layer1.0.bn1`."""
    _, *parts = path.split(".")
    inner = type(unwrapped(root)).__name__
    return ".".join([inner, *(part for part in parts if part not in WRAPPERS)])


# what DistributedDataParallel, torch.compile and FSDP put between a model and its parts


def sequences_of(views: Sequence[RankView], group: tuple[str, tuple[int, ...]]) -> dict[int, Calls]:
    """By rank, the calls in which a group is asked; of those that never asked, none."""
    found = {}
    for view in views:
        if view.rank in group[1]:
            own = (calls for calls in view.calls if calls.key == group)
            found[view.rank] = next(own, Calls(*group))
    return found


def _has_values(tensor: Tensor) -> bool:
    """Whether all of them are here: not of a lazy layer's, and not in parts or put away (FSDP)."""
    if is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "full_tensor"):
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().size() > 0

"""Statistics of all ranks' batches: torch.distributed's mini-batch as the one that it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from batchnorm.functional import Options, synchronized_batch_norm
from batchnorm.moments import Moments
from batchnorm.ranks import UNKNOWN, Caller, GraphPeers, Peers, caller_of, size_of, step
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Sync"]


@dataclass(frozen=True)
class Sync(Statistics):
    """The mean and variance of the batches of all ranks, as one process would have them.

    ```python
    dist.init_process_group()                                   # under torchrun
    model = DistributedDataParallel(Net(norm=partial(BatchNorm2d, statistics=Sync())))
    BatchNorm2d(64, statistics=Sync.groups_of(8))               # of each 8 neighbouring ranks
    BatchNorm2d(64, statistics=Sync(slices=Ghost(32)))
    ```

    Outputs, gradients (summed over the ranks, which DistributedDataParallel averages), running
    statistics and counter are those of one process with the concatenated batch. Ranks may have
    any number of samples, none included; one value per channel in all of them together is an
    error. Works inside torch.compile too. NCCL on GPUs has not been tried.

    A training step costs one collective forward, of 2c + 1 numbers, and one backward, of 2c, for
    each layer; inference costs none, nor does a world of one rank, or one where
    torch.distributed is not initialized: there it is `Batch()`.

    - `group`: the ranks; None for the default group of torch.distributed, whatever that is when
      the layer is called.
    - `slices`: `Ghost(size)`, for slices inside of each rank's batch that are normalized apart:
      nothing is waited for but the running statistics, which take up all ranks' batches.
    - `neighbours`: see `groups_of`.

    All ranks of a group must call the layer in training mode equally often, and in the same
    order as other layers, and go backward through the same ones. Where one does not, or dies, the
    others raise `SyncError` on gloo, at the latest after the group's time limit; NCCL ends the
    process. Backward passes through different layers of one width are not noticed. Where
    DistributedDataParallel reduces gradients in an order that differs between ranks, as
    `find_unused_parameters=True` may, give a group of its own, `Sync(dist.new_group())`.

    Raises `TypeError` for a `group` that is no process group, or `slices` that are no `Ghost`;
    `ValueError` for both `group` and `neighbours`.

    Source: Peng et al. 2018, "MegDet: A large mini-batch object detector", section 3.3.
    """

    group: dist.ProcessGroup | None = None
    slices: Ghost | None = None
    neighbours: int | None = None
    caller: Caller = field(default=UNKNOWN, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                "Sync(group=...) needs a process group, as torch.distributed.new_group gives one "
                f"to the ranks in it, got {self.group!r}"
            )
        if self.slices is not None and not isinstance(self.slices, Ghost):
            raise TypeError(
                f"Sync(slices=...) needs slices of a rank's batch, Ghost(size), got {self.slices!r}"
            )
        if self.neighbours is not None:
            if type(self.neighbours) is not int or self.neighbours < 1:
                raise ValueError(
                    f"Sync.groups_of(k) needs a whole number of ranks from 1 on, got "
                    f"{self.neighbours!r}"
                )
            if self.group is not None:
                raise ValueError("Sync takes a group or a number of neighbours, got both")

    @classmethod
    def groups_of(cls, k: int, *, slices: Ghost | None = None) -> Sync:
        """Over groups of k ranks, neighbours on a node as a rule: 0 to k − 1, k to 2k − 1, ….

        All ranks must call this; where torch.distributed is not initialized yet, the groups are
        made at the first batch. In a world of up to k ranks it is the whole world.

        Raises `ValueError` where k does not divide the number of ranks.
        """
        policy = cls(slices=slices, neighbours=k)
        if size_of(None) > 1:
            _neighbours(k)
        return policy

    @property
    def size(self) -> int:
        """How many ranks share statistics now.

        Raises `RuntimeError` where there is a group, and torch.distributed is not initialized any
        more.
        """
        world = size_of(None)
        if self.group is None:
            return world if self.neighbours is None else min(world, self.neighbours)
        if not dist.is_initialized():
            raise RuntimeError(
                "Sync(group) was given a process group that has been destroyed; make the layer's "
                "policy anew, or use eval() for inference"
            )
        return size_of(self.group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share statistics; None for the default group.

        Neighbours' groups are made where they are not there yet, by all ranks together.
        """
        return self.group if self.neighbours is None else _neighbours(self.neighbours)

    def of(self, layer: nn.Module) -> Statistics:
        """The policy, telling the other ranks which layer asks; alone, what needs none."""
        if torch.compiler.is_compiling():
            return self
        return self._alone() if self.size == 1 else replace(self, caller=caller_of(layer))

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize by all ranks' moments, which the running statistics take up."""
        peers = self._peers()
        if peers is None or x.shape[1] == 0:
            return self._alone().normalize(x, weight, bias, running, **options)
        if self.slices is None:
            y, batch = synchronized_batch_norm(x, weight, bias, peers=peers, **options)
            _check_has_variance(x, batch, self)
        else:
            y, mine = self.slices.normalize(x, weight, bias, running, **options)
            assert mine is not None
            batch = peers.merged(mine)
        if running is not None and not torch.compiler.is_compiling():
            step.keep(*running)
        return y, batch

    def smallest_slice(self, n: int) -> int:
        """This rank's samples where it is alone; else it is seen with the others' batches."""
        if self.slices is not None:
            return self.slices.smallest_slice(n)
        return n if self.size == 1 else 0

    def __repr__(self) -> str:
        told = []
        if self.group is not None:
            told.append(f"group={_listed(self.group)}")
        if self.slices is not None:
            told.append(f"slices={self.slices}")
        if self.neighbours is not None:
            told.append(f"neighbours={self.neighbours}")
        return f"Sync({', '.join(told)})"

    def __deepcopy__(self, memo: object) -> Sync:
        return self  # a process group is not copied, and nothing here changes

    def __reduce__(self) -> tuple[object, ...]:
        if self.group is not None:
            raise TypeError(
                f"{self} holds a process group, which exists in this process alone, and cannot be "
                "pickled; save the model's state_dict(), or use Sync() or Sync.groups_of(k)"
            )
        return Sync, (None, self.slices, self.neighbours)

    def _alone(self) -> Statistics:
        """What it is in a world of one."""
        return self.slices or _BATCH

    def _peers(self) -> Peers | GraphPeers | None:
        """The ranks to ask; None where this one is alone."""
        if self.size == 1:
            return None
        group = self.process_group
        if not torch.compiler.is_compiling():
            return Peers(group, self.caller)
        named = dist.group.WORLD if group is None else group
        assert named is not None
        return GraphPeers(named.group_name, dist.get_world_size(group), dist.get_rank(group))


_BATCH = Batch()

_groups: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


def _neighbours(k: int) -> dist.ProcessGroup | None:
    """This rank's group of k, made once for a world; None for the whole world."""
    world = size_of(None)
    if k >= world:
        return None
    default = dist.group.WORLD
    assert default is not None
    made = _groups.setdefault(default, {})
    if k not in made:
        if world % k:
            raise ValueError(
                f"Sync.groups_of({k}) needs a number of ranks that {k} divides, got {world}; "
                "choose a divisor, or pass a group of your own"
            )
        made[k], _ = dist.new_subgroups(group_size=k)
    return made[k]


def _check_has_variance(x: Tensor, batch: Moments, policy: Sync) -> None:
    """Raise where all ranks together have one value per channel; not looked at by a compiler.

    Only a rank with one value or none can be among those, and only such a one waits for its
    device to tell.
    """
    if torch.compiler.is_compiling() or x.shape[0] * x.shape[2:].numel() > 1:
        return
    if batch.count[0] == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(x.shape)} with statistics={policy}, and one value on all ranks together: it "
            "is its own mean, so its variance is 0 and every output would be β. Use larger "
            "batches, call eval() if this is inference, or freeze() the layer"
        )


def _listed(group: dist.ProcessGroup) -> str:
    try:
        return f"<ranks {dist.get_process_group_ranks(group)}>"
    except (KeyError, RuntimeError):  # destroyed since
        return "<a group that is no more>"

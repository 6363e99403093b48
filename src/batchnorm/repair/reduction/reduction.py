"""The running statistics of ranks that train apart, merged by count: see `reduce_statistics`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.norms import TorchBatchNorm, Where, batch_norms, is_meant
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.models.wrapped import unwrapped
from batchnorm.ranks import Ranks
from batchnorm.repair.recalibration.passes import fitting
from batchnorm.repair.reduction.merging import Held, Merged, Told, merge, weights_of
from batchnorm.repair.table import counted, shown, table

__all__ = ["Reduction", "Spread", "reduce_statistics"]


def reduce_statistics(
    model: nn.Module,
    *,
    samples: int | None = None,
    group: dist.ProcessGroup | None = None,
    where: Where = None,
) -> Reduction:
    """Merge the running statistics of ranks that each normalize their own batches, by count.

    mean = Σ wᵢ·meanᵢ / Σ wᵢ,  var = Σ wᵢ·(varᵢ + (meanᵢ − mean)²) / Σ wᵢ

    over the ranks i. Ranks that normalize apart learn each the statistics of their own shard, and
    DistributedDataParallel's answer, to send rank 0's to all before every forward pass, costs a
    broadcast a step and forgets what the others saw. Merge before evaluating and saving instead.

    ```python
    # forward_sync_buffers=False, from PyTorch 2.13 on
    model = DistributedDataParallel(model, broadcast_buffers=False)
    for epoch in range(epochs):
        train(model, loader)
        print(reduce_statistics(model))                     # on all ranks
        evaluate(model)
    reduce_statistics(model, samples=len(shard))            # shards of unequal sizes
    ```

    A rank counts by the batches that each layer has tracked there, or by its `samples`; where a
    layer tracked none it counts nothing, and takes the others' statistics. All ranks end with the
    same bits. The counter becomes the largest of all ranks', since they have trained side by side:
    what is scheduled by it goes on without a jump, and a mean of momentum=None, trained further by
    ranks that had as many batches each and merged again, is that of all batches still.

    Every layer with running statistics takes part, frozen and synchronized ones too: what the ranks
    hold alike stays as it is, to the bit. It is one exchange for the whole model (among thousands
    of ranks, as many as keep it small), beside one in which the ranks compare their layers. In a
    world of one, and without torch.distributed, there is nothing to do.

    - `model`: may be wrapped in DistributedDataParallel, DataParallel and `torch.compile`.
    - `samples`: for how many samples this rank's statistics stand, the size of its shard; on all
      ranks or on none. By default w is `num_batches_tracked`, which suits batches of equal size.
    - `group`: the ranks, by default all. All of them call this.
    - `where`: which layers, by their paths in the model without wrappers.

    Returns how far apart the ranks were; its `undo()` gives each rank its own statistics back.

    Raises, on all ranks, after which the model is what it was: `ValueError` where there is no
    layer with running statistics, ranks differ in their layers or in giving `samples`, running
    statistics that count are no finite mean and variance, nobody has counted what differs, or a
    merged number exceeds what half precision buffers hold; `TypeError` for what is no module or
    no number of samples. `RuntimeError` on the others where one rank alone fails.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", eq. 2.1, for the merging.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"reduce_statistics takes a torch.nn.Module, got {type(model).__name__}")
    model, ranks = unwrapped(model), Ranks(group)
    with undone_on_failure(model), ranks.together():
        layers = _meant(model, where)
        _check_samples(samples)
        told = ranks.gather(Told(samples, {p: Held.by(layer) for p, layer in layers.items()}))
        if len(told) == 1:
            return Reduction(1, (), (), ())
        weights = weights_of(told)
        merged = merge(layers, weights, ranks)
        untracked = tuple(path for path, numbers in weights.items() if not any(numbers))
        _check_alike(untracked, merged)
        taken = {path: layer for path, layer in layers.items() if path not in untracked}
        new, former = [], []
        for path, layer in taken.items():
            values = fitting(repr(shown(path)), layer, merged[path].mean, merged[path].var)
            most = max(each.layers[path].batches or 0 for each in told)
            for buffer, value in zip(_buffers(layer), (*values, torch.tensor(most)), strict=False):
                former.append((buffer, buffer.detach().clone()))
                new.append((buffer, value))
        _put(new)
    spreads = tuple(_spread(path, weights[path], merged[path]) for path in taken)
    return Reduction(len(told), spreads, untracked, tuple(former))


@dataclass(frozen=True)
class Spread:
    """How far apart the ranks were in one layer, in σ = √(var + ε) of the merged statistics.

    - `weights`: how much each rank counted.
    - `mean`: √(Σ wᵢ·(meanᵢ − mean)² / Σ wᵢ) / σ, root mean square over channels.
    - `mean_most`, `rank`: the largest |meanᵢ − mean| / σ of a rank and channel; and which rank's.
    - `std_most`: the σᵢ / σ of a rank and channel that is farthest from 1.
    """

    path: str
    weights: tuple[int, ...]
    mean: float
    mean_most: float
    rank: int
    std_most: float


@dataclass(frozen=True, eq=False, repr=False)
class Reduction:
    """What `reduce_statistics` did; prints the layers in which the ranks lay farthest apart first.

    - `ranks`: how many there were. Of one nothing was merged.
    - `layers`: how far apart they were in each layer, in the model's order.
    - `untracked`: layers that took up no batch on any rank, the same on all, and left alone.
    """

    ranks: int
    layers: tuple[Spread, ...]
    untracked: tuple[str, ...]
    _former: tuple[tuple[Tensor, Tensor], ...]

    def undo(self) -> None:
        """Put the former statistics and counters back, each rank its own; the others need not."""
        _put(self._former)

    def __repr__(self) -> str:
        if self.ranks == 1:
            return "Reduction: one rank, whose statistics are those of all; nothing to merge"
        rows = [
            (
                shown(layer.path),
                f"{layer.mean:.2g} σ",
                f"{layer.mean_most:.2g} σ",
                f"{layer.rank}",
                f"×{layer.std_most:.3g}",
                _range(layer.weights),
            )
            for layer in sorted(self.layers, key=lambda layer: -layer.mean_most)
        ]
        head = ("layer", "means apart", "at most", "of rank", "std at most", "weight of a rank")
        title = f"Reduction: {counted(len(self.layers), 'layer')} over {self.ranks:,} ranks"
        text = table(title, head, rows)
        if self.untracked:
            text += f"\nnever tracked, left alone: {', '.join(map(shown, self.untracked))}"
        return text


def _meant(model: nn.Module, where: Where) -> dict[str, TorchBatchNorm]:
    """The layers with running statistics that are meant, by path."""
    kept = {
        path: layer
        for path, layer in batch_norms(model).items()
        if layer.running_mean is not None and layer.running_var is not None
    }
    meant = {path: layer for path, layer in kept.items() if is_meant(path, layer, where)}
    if not kept:
        raise ValueError(
            f"{type(model).__name__} has no batch norm layer with running statistics, so there is "
            "nothing to reduce"
        )
    if not meant:
        raise ValueError(f"where={where!r} means none of the batch norm layers {list(kept)}")
    for path, layer in meant.items():
        if any(is_lazy(buffer) or buffer.is_meta for buffer in layer.buffers(recurse=False)):
            raise ValueError(
                f"{shown(path)!r} is lazy or on the meta device, and its statistics have no "
                "values; call the model with a batch first, or load its weights"
            )
    return meant


def _check_samples(samples: int | None) -> None:
    if samples is None:
        return
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise TypeError(f"samples must be a whole number, the size of a shard, got {samples!r}")
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")


def _check_alike(untracked: tuple[str, ...], merged: dict[str, Merged]) -> None:
    """Raise `ValueError` where nobody knows how to weigh what differs."""
    for path in untracked:
        if not merged[path].is_alike.all():
            raise ValueError(
                f"{shown(path)!r} has other running statistics on other ranks, though no rank has "
                "counted a batch; tell how many samples each rank's stand for, with samples=, or "
                "leave the layer out with where="
            )


def _buffers(layer: TorchBatchNorm) -> list[Tensor]:
    """The running mean, variance, and the counter where there is one."""
    buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _put(values: list[tuple[Tensor, Tensor]] | tuple[tuple[Tensor, Tensor], ...]) -> None:
    """Into the buffers as they are: others, such as DistributedDataParallel, hold them too."""
    for buffer, value in values:
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(value)


def _spread(path: str, weights: tuple[int, ...], merged: Merged) -> Spread:
    channel = int(merged.farthest.argmax())
    stretch = merged.stretch[merged.stretch.log().abs().argmax()]
    return Spread(
        path,
        weights,
        merged.distance.square().mean().sqrt().item(),
        merged.farthest[channel].item(),
        int(merged.rank[channel]),
        stretch.item(),
    )


def _range(weights: tuple[int, ...]) -> str:
    least, most = min(weights), max(weights)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"

"""Running statistics computed again: exactly those of the data, with the weights as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.models.calling import Forward, call
from batchnorm.models.norms import TorchBatchNorm, Where
from batchnorm.models.snapshot import left_as_it_was, undone_on_failure
from batchnorm.models.wrapped import unwrapped
from batchnorm.moments import Moments
from batchnorm.ranks import Ranks
from batchnorm.repair.recalibration.estimates import in_one_pass, layer_by_layer, population
from batchnorm.repair.recalibration.layers import recalibrated_and_frozen
from batchnorm.repair.recalibration.stream import Stream, progress_bar
from batchnorm.repair.table import counted, shown, table

__all__ = ["Recalibration", "Shift", "recalibrate"]

_ESTIMATES = {"batch": in_one_pass, "running": layer_by_layer}


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    samples: int | None = None,
    group: dist.ProcessGroup | None = None,
    upstream: Literal["batch", "running"] = "batch",
    where: Where = None,
    progress: bool | None = None,
) -> Recalibration:
    """Make the running statistics those of `batches`, with the weights as they are now.

    running_mean = Σx / n,  running_var = Σ(x − running_mean)² / (n − 1)

    over all n elements of a channel that enter the layer in all batches on all ranks, whatever
    the sizes of the batches. An average of the batches' variances would leave out how far their
    means lie apart. n − 1, because training keeps the unbiased variance too.

    ```python
    recalibrate(model, loader)                          # after training, before evaluating
    recalibrate(model, loader, samples=10_000)          # of some of the data
    recalibrate(model, loader, upstream="running")      # with what inference will show each layer
    recalibrate(model, loader, forward=lambda model, batch: model(batch["image"].cuda()))
    recalibrate(model, loader, where="backbone.*").undo()       # the former statistics again
    ```

    Everything is in eval mode meanwhile, nothing is recorded for gradients, and afterwards only
    the running means and variances have changed: modes, hooks, momentum, the random state and
    `num_batches_tracked`, which counts training's batches, are what they were. On any failure so
    are the statistics. A layer that is called several times in a pass pools its calls; one that
    is called with `mask=` counts what the mask leaves. Compiled parts run as they were written.

    Layers that were frozen on purpose are left alone: those whose running statistics training
    does not move, by `freeze`, `track_running_stats=False`, `statistics=Running()` or
    `Untracked(...)`, and those in eval mode while the model trains (some module with parameters
    is in training mode). Whether γ and β learn does not matter. In a model for inference, all in
    eval mode, every other layer with running statistics is recalibrated.

    - `batches`: any iterable; of a tuple or list the model gets the first entry, of a dictionary
      all by name. Each must leave a layer more than one value per channel, unless `upstream` is
      "running".
    - `forward`: how to call the model with a batch, where that is otherwise.
    - `samples`: stop after as many, on each rank. They are counted by the size of dimension 0 of
      a batch's first tensor; the last batch is cut.
    - `group`: the ranks whose data is pooled, by default all where torch.distributed is
      initialized. All of them call this, with any number of batches, none included, and end with
      the same bits. What DistributedDataParallel or DataParallel wraps is called without it; a
      model that itself communicates in its forward pass, as FSDP does, needs as many batches on
      every rank.
    - `upstream`: what the layers before one normalize with. "batch": with the mean and variance
      of each batch (of this rank, whatever the layer's policy), in a single pass. "running": with
      their new running statistics, as at inference; this takes a pass for each layer, up to that
      layer, and keeps the batches in memory: limit them with `samples`. Between the calls of a
      layer that is called several times, it and those after it normalize with the batch.
    - `where`: which layers, by path.
    - `progress`: whether a bar is shown on stderr; None: where that is a terminal.

    Returns how far each layer's statistics moved; its `undo()` puts the former ones back.

    Raises `ValueError` where there is nothing to recalibrate, no batch or no layer's call; for
    an adapted model, whose layers' inputs are moved; for the first layer whose input is not
    finite; where one value has no variance; where a mean or variance, of a batch or of all,
    exceeds what half precision buffers hold; and for lazy and meta tensors. `TypeError` for what
    is no module, or one batch in place of several. On the other ranks, `RuntimeError` where one
    fails.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise BatchNorm).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recalibrate takes a torch.nn.Module, got {type(model).__name__}")
    if upstream not in _ESTIMATES:
        raise ValueError(f"upstream must be one of {list(_ESTIMATES)}, got {upstream!r}")
    # DistributedDataParallel's own forward pass sends buffers to all ranks, which would wait for
    # each other where one has fewer batches; DataParallel's calls copies, on other devices
    called, forward = unwrapped(model), forward or call
    ranks = Ranks(group)
    with undone_on_failure(model), ranks.together():
        layers, frozen = recalibrated_and_frozen(model, where)
        _check_same(ranks.gather(list(layers)))
        stream = Stream(batches, samples)
        with left_as_it_was(model), _eager(), progress_bar(progress, ranks.rank) as show:
            for module in model.modules():
                module.training = False
            found = _ESTIMATES[upstream](
                layers, stream, lambda batch: forward(called, batch), ranks, show
            )
        seen = ranks.gather((stream.batches, stream.samples))
        all_batches, all_samples = (sum(counts) for counts in zip(*seen, strict=True))
        _check_found(found, layers, all_batches)
        new = {path: population(path, layers[path], moments) for path, moments in found.items()}
        former = {path: _statistics(layers[path]) for path in layers if path in found}
        shifts = tuple(_shift(path, layers[path].eps, former[path], new[path]) for path in former)
        for path, statistics in new.items():
            _put(layers[path], *statistics)
    uncalled = tuple(path for path in layers if path not in found)
    to_undo = tuple((layers[path], *statistics) for path, statistics in former.items())
    return Recalibration(shifts, all_batches, all_samples, uncalled, frozen, to_undo)


@dataclass(frozen=True)
class Shift:
    """How far a layer's running statistics moved, as σ = √(running_var + ε) before it measures.

    - `mean`: |new mean − old mean| / σ, root mean square over channels; `mean_most`: the largest.
    - `std`: new σ / old σ, geometric mean over channels; `std_most`: the one farthest from 1.

    Not finite where the old statistics were not.
    """

    path: str
    mean: float
    mean_most: float
    std: float
    std_most: float


@dataclass(frozen=True, eq=False, repr=False)
class Recalibration:
    """What `recalibrate` did.

    - `layers`: how far each one's statistics moved, in the model's order.
    - `batches`, `samples`: how many there were, on all ranks; 0 samples where no tensors show it.
    - `uncalled`: layers that no batch went through, which keep their statistics.
    - `frozen`: layers left alone because they were frozen on purpose.
    """

    layers: tuple[Shift, ...]
    batches: int
    samples: int
    uncalled: tuple[str, ...]
    frozen: tuple[str, ...]
    _former: tuple[tuple[TorchBatchNorm, Tensor, Tensor], ...]

    def undo(self) -> None:
        """Put the former statistics back; under torch.distributed, each rank its own."""
        for layer, mean, var in self._former:
            _put(layer, mean, var)

    def __repr__(self) -> str:
        samples = f"{self.samples:,} samples in " if self.samples else ""
        title = f"Recalibration: {counted(len(self.layers), 'layer')}, {samples}"
        rows = [
            (
                shown(s.path),
                f"{s.mean:.2g} σ",
                f"{s.mean_most:.2g} σ",
                f"×{s.std:.3g}",
                f"×{s.std_most:.3g}",
            )
            for s in self.layers
        ]
        head = ("layer", "mean moved", "at most", "std", "at most")
        text = table(title + counted(self.batches, "batch", "batches"), head, rows)
        for what, paths in (("never called", self.uncalled), ("frozen", self.frozen)):
            if paths:
                text += f"\n{what}, left alone: {', '.join(map(shown, paths))}"
        return text


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run as they were written: they do not call hooks that came later."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _check_same(layers_of_ranks: list[list[str]]) -> None:
    for rank, layers in enumerate(layers_of_ranks):
        if layers != layers_of_ranks[0]:
            differing = sorted(set(layers) ^ set(layers_of_ranks[0]))
            raise ValueError(
                f"all ranks must recalibrate the same layers; ranks 0 and {rank} differ in "
                f"{differing}: freeze the same ones, and pass the same where="
            )


def _check_found(
    found: dict[str, Moments], layers: dict[str, TorchBatchNorm], batches: int
) -> None:
    if batches == 0:
        raise ValueError(
            "batches must hold at least one batch, got none; an iterator can be walked through "
            "only once: make a new one, or pass the DataLoader itself"
        )
    if not found:
        raise ValueError(
            f"none of the layers {list(layers)} was called with the {batches} batches; the model "
            "does not use them, or calls their forward() past the hooks"
        )


def _statistics(layer: TorchBatchNorm) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()


def _put(layer: TorchBatchNorm, mean: Float[Tensor, " c"], var: Float[Tensor, " c"]) -> None:
    """Into the buffers as they are: others, such as DistributedDataParallel, hold them too."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    for buffer, values in ((layer.running_mean, mean), (layer.running_var, var)):
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(values)


def _shift(
    path: str, eps: float, former: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> Shift:
    (old_mean, old_var), (mean, var) = ([t.double().cpu() for t in pair] for pair in (former, new))
    sigma = (old_var + eps).sqrt()
    moved = (mean - old_mean).abs() / sigma
    stretch = ((var + eps).sqrt() / sigma).log()
    farthest = stretch[stretch.abs().argmax()]
    return Shift(
        path,
        moved.square().mean().sqrt().item(),
        moved.max().item(),
        stretch.mean().exp().item(),
        farthest.exp().item(),
    )

"""Estimate the statistics of everything that enters each layer, over all batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from batchnorm.models.calling import with_tensors
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.moments import Moments
from batchnorm.ranks import Ranks
from batchnorm.repair.recalibration.passes import Pass, Run, bind, fitting
from batchnorm.repair.recalibration.stream import Shown, Stream
from batchnorm.repair.table import shown

__all__ = ["in_one_pass", "layer_by_layer", "population"]


def in_one_pass(
    layers: Mapping[str, TorchBatchNorm], stream: Stream, run: Run, ranks: Ranks, show: Shown
) -> dict[str, Moments]:
    """The moments of what enters each layer while all normalize with the batch at hand."""
    seen = Pass(layers, needs_variance=True).over(show(stream, "Recalibrating"), run).moments
    parts = ranks.gather({path: _on_cpu(moments) for path, moments in seen.items()})
    every = {path: [part[path] for part in parts if path in part] for path in layers}
    return {path: Moments.merge(many) for path, many in every.items() if many}


def layer_by_layer(
    layers: Mapping[str, TorchBatchNorm], stream: Stream, run: Run, ranks: Ranks, show: Shown
) -> dict[str, Moments]:
    """The moments of what enters each layer while those before it use their new statistics.

    The layers' statistics become the new ones. Every layer takes a pass over the batches, which
    ends where the layer is reached, and runs on copies: a model may work in place.
    """
    batches = list(show(stream, "Reading batches"))

    def run_copy(batch: object) -> None:
        run(_copied(batch))

    first = Pass(layers).over(show(batches, "Recalibrating: order of the layers"), run_copy)
    order = _order(path for part in ranks.gather(_distinct(first.paths)) for path in part)
    waiting, found = dict(layers), dict[str, Moments]()
    for number, path in enumerate(order):
        seen = first  # what enters the first layer depends on no other
        if number:
            calls = [paths.count(path) for paths in first.paths]
            purpose = f"Recalibrating: {shown(path)}, {number + 1} of {len(order)}"
            seen = Pass(waiting, path, calls).over(show(batches, purpose), run_copy)
        mine = seen.moments.get(path)
        parts = ranks.gather(None if mine is None else _on_cpu(mine))
        found[path] = Moments.merge(part for part in parts if part is not None)
        bind(layers[path], *population(path, layers[path], found[path]))
        del waiting[path]
    return found


def population(
    path: str, layer: TorchBatchNorm, moments: Moments
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """A layer's running mean and (unbiased) variance, as its buffers will hold them.

    Raises `ValueError` where no variance exists, or the buffers' numbers do not reach that far.
    """
    if (moments.count < 2).any():
        raise ValueError(
            f"{shown(path)!r}: {int(moments.count.min())} value per channel in all batches "
            "together has no variance; recalibrate with more samples"
        )
    return fitting(repr(shown(path)), layer, moments.mean, moments.var(unbiased=True))


def _copied(batch: Any) -> Any:
    """A deep copy, also of tensors with a graph behind them, which `deepcopy` refuses."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(batch, note)
    done: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in found}
    return copy.deepcopy(batch, done)


def _order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """The layers by their first call, whichever batch it is in which one comes before another.

    One that a later batch brings goes right behind the one before it there.
    """
    order: list[str] = []
    for sequence in sequences:
        place = 0
        for path in dict.fromkeys(sequence):
            if path not in order:
                order.insert(place, path)
            place = order.index(path) + 1
    return order


def _distinct(sequences: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(map(tuple, sequences)))


def _on_cpu(moments: Moments) -> Moments:
    return Moments(*(t.cpu() for t in (moments.count, moments.mean, moments.m2)))

"""What the ranks hold of each layer: told, compared, and merged by count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from batchnorm.models.norms import TorchBatchNorm
from batchnorm.moments import Moments
from batchnorm.ranks import Ranks
from batchnorm.repair.table import listed, shown

__all__ = ["Held", "Merged", "Told", "merge", "weights_of"]

_AT_ONCE = 2**22  # numbers of all ranks together that a rank holds at a time


class Held(NamedTuple):
    """What a rank has in a layer, but for the statistics themselves.

    - `channels`, `dtype`: of the running statistics.
    - `batches`: how many they took up; None where nobody counts.
    - `is_sound`: whether they are a finite mean and a variance.
    """

    channels: int
    dtype: str
    batches: int | None
    is_sound: bool

    @classmethod
    def by(cls, layer: TorchBatchNorm) -> Held:
        """What a layer holds on this rank."""
        mean, var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None
        assert var is not None
        is_sound = mean.isfinite().all() & var.isfinite().all() & (var >= 0).all()
        number = None if batches is None else int(batches)
        return cls(len(mean), f"{mean.dtype} and {var.dtype}", number, bool(is_sound))


@dataclass(frozen=True)
class Told:
    """What a rank tells the others: its samples, if it was given them, and what it holds."""

    samples: int | None
    layers: dict[str, Held]


def weights_of(told: Sequence[Told]) -> dict[str, tuple[int, ...]]:
    """How much each rank's statistics of a layer count, by path; all 0: nobody tracked it.

    Raises `ValueError`, on all ranks the same, where the ranks have not the same layers, where
    their statistics are no mean and variance, and where nobody counted.
    """
    _check_same(told)
    weights = {path: _weights(path, told) for path in told[0].layers}
    for path, numbers in weights.items():
        for rank, each in enumerate(told):
            if not each.layers[path].is_sound and (numbers[rank] or not any(numbers)):
                raise ValueError(
                    f"rank {rank} of {len(told)}: the running statistics of {shown(path)!r} are no "
                    "finite mean and variance, and would spoil those of all ranks; recalibrate "
                    "the model, load a checkpoint there, or leave that rank out with samples=0 "
                    "on it (and each one's number of samples on the others)"
                )
    return weights


def _weights(path: str, told: Sequence[Told]) -> tuple[int, ...]:
    batches = [each.layers[path].batches for each in told]
    samples = [each.samples for each in told if each.samples is not None]
    counts = [number for number in batches if number is not None]
    if samples:  # of no use to a layer that only other ranks called
        called = any(counts)
        return tuple(0 if called and not b else n for n, b in zip(samples, batches, strict=True))
    if not counts:
        raise ValueError(
            f"{shown(path)!r} has no num_batches_tracked to be weighed by; tell how many samples "
            "each rank's statistics stand for, with samples="
        )
    return tuple(counts)


def _check_same(told: Sequence[Told]) -> None:
    """Raise `ValueError` for a rank that has other layers than the first, or another call."""
    first = told[0]
    for rank, each in enumerate(told):
        if (each.samples is None) != (first.samples is None):
            raise ValueError(
                f"samples= must be given on all ranks or on none; ranks 0 and {rank} differ"
            )
        if list(each.layers) != list(first.layers):
            differing = sorted(each.layers.keys() ^ first.layers.keys())
            raise ValueError(
                f"all ranks must merge the same layers; ranks 0 and {rank} differ in "
                f"{listed(differing) or 'their order'}: build the same model, and pass the same "
                "where="
            )
        for path, held in each.layers.items():
            other = first.layers[path]
            if _form(held) != _form(other):
                raise ValueError(
                    f"{shown(path)!r} must have the same running statistics on all ranks, got "
                    f"{_form(other)} on rank 0 and {_form(held)} on rank {rank}: build the same "
                    "model"
                )


def _form(held: Held) -> str:
    counter = "no counter" if held.batches is None else "a counter"
    return f"{held.channels} channels in {held.dtype} with {counter}"


class Merged(NamedTuple):
    """A layer's statistics over all ranks, and how far each channel's lie apart.

    - `distance`: √(Σ wᵢ·(meanᵢ − mean)² / Σ wᵢ) / σ, with σ = √(var + ε).
    - `farthest`, `rank`: |meanᵢ − mean| / σ where it is largest, and on which rank that is.
    - `stretch`: σᵢ / σ on the rank where it is farthest from 1.
    - `is_alike`: whether all ranks that count hold the same.
    """

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]
    distance: Float[Tensor, " c"]
    farthest: Float[Tensor, " c"]
    rank: Int[Tensor, " c"]
    stretch: Float[Tensor, " c"]
    is_alike: Bool[Tensor, " c"]


def merge(
    layers: Mapping[str, TorchBatchNorm], weights: Mapping[str, tuple[int, ...]], ranks: Ranks
) -> dict[str, Merged]:
    """The statistics of all ranks merged, in float64 on the CPU: the same bits on all of them.

    One exchange for all layers; or as many as keep what a rank gets within some memory, where
    there are thousands of ranks. Of a layer that nobody tracked all ranks count alike.
    """
    means = [_wide(layer.running_mean) for layer in layers.values()]
    variances = [_wide(layer.running_var) for layer in layers.values()]
    sizes = [len(mean) for mean in means]
    mine = torch.stack([torch.cat(means), torch.cat(variances)])
    counts = torch.tensor([weights[path] for path in layers])  # (layers, ranks)
    counts = counts.where(counts.any(1, keepdim=True), 1)
    eps = torch.tensor([layer.eps for layer in layers.values()], dtype=torch.float64)
    layer_of = torch.arange(len(layers)).repeat_interleave(torch.tensor(sizes))
    parts = []
    for channels in torch.arange(sum(sizes)).split(max(1, _AT_ONCE // counts.shape[1])):
        theirs = torch.stack(ranks.gather(mine[:, channels]))
        its = layer_of[channels]
        parts.append(_merged(theirs[:, 0], theirs[:, 1], counts[its].T, eps[its]))
    found = [torch.cat(each).split(sizes) for each in zip(*parts, strict=True)]
    return {path: Merged(*each) for path, *each in zip(layers, *found, strict=True)}


def _merged(
    means: Float[Tensor, "ranks c"],
    variances: Float[Tensor, "ranks c"],
    counts: Int[Tensor, "ranks c"],
    eps: Float[Tensor, " c"],
) -> Merged:
    counted = counts > 0
    # what a rank holds that counts nothing may be no number
    means, variances = means.where(counted, 0), variances.where(counted, 0)
    whole = Moments(counts, means, variances * counts).pool(0)
    first = counted.int().argmax(0, keepdim=True)
    same = (means == means.gather(0, first)) & (variances == variances.gather(0, first))
    is_alike = (same | ~counted).all(0)
    var = variances.gather(0, first)[0].where(is_alike, whole.var())  # to the bit, as the mean is
    sigma = (var + eps).sqrt()
    off = (means - whole.mean).abs().where(counted, 0) / sigma
    stretch = ((variances + eps).sqrt() / sigma).log().where(counted, 0)
    most = stretch.abs().argmax(0, keepdim=True)
    distance = ((counts * off.square()).sum(0) / counts.sum(0)).sqrt()
    return Merged(
        whole.mean, var, distance, *off.max(0), stretch.gather(0, most)[0].exp(), is_alike
    )


def _wide(statistic: Tensor | None) -> Float[Tensor, " c"]:
    assert statistic is not None
    return statistic.detach().cpu().double()  # in this order: not every device knows float64

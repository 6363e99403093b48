"""Averaged weights, with batch norm statistics that are theirs.

Weights average: EMA, SWA and federated learning rest on it. A variance does not: the models'
means differ too, and what they differ by is spread as well. So the statistics are merged as
moments, or estimated again for the averaged weights, with which nobody has seen data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.kernels import accumulator
from batchnorm.models.calling import Forward
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.moments import Moments
from batchnorm.repair.averaging.states import ModelOrState, State, checked_states
from batchnorm.repair.recalibration import Recalibration, recalibrate
from batchnorm.repair.table import counted, shown, table

__all__ = ["Averaging", "MergedLayer", "average"]


def average(
    model: nn.Module,
    models: Iterable[ModelOrState],
    *,
    weights: Sequence[int | float] | None = None,
    counts: Sequence[int | float] | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> Averaging:
    """Give `model` the average of the weights of `models`, and statistics that fit them.

    weight = Σ wᵢ·weightᵢ / Σ wᵢ,
    mean = Σ nᵢ·meanᵢ / n,  var = Σ nᵢ·(varᵢ + (meanᵢ − mean)²) / n,  n = Σ nᵢ

    ```python
    average(model, checkpoints)                                # SWA
    average(model, (torch.load(path) for path in paths))       # one by one
    average(model, clients, weights=[1200, 80, 640])           # federated: samples of each
    average(ema, [ema, model], weights=[0.999, 0.001])         # a step of EMA
    average(model, checkpoints, batches=loader)                # statistics estimated again
    average(model, checkpoints).undo()
    ```

    The merged statistics describe all that the models' layers were given, and the variance takes
    in how far the means lie apart. What the layers are given under the averaged weights only data
    can tell: pass `batches` where there are some. Running statistics that follow a momentum have
    no true count, since they remember about 1/momentum batches whatever came before: `counts`
    are proportions.

    Floating-point buffers that are no statistics are averaged as weights are; integers and flags
    are the first model's; what all models agree on keeps its bits. A counter of batches is never
    averaged: `num_batches_tracked` becomes the largest, since the models of one run have seen the
    same batches, and what is scheduled by it goes on without a jump. Sums are float64 and rounded
    once, to the dtypes of `model`, whose parameters stay the same objects.

    A `torch.optim.swa_utils.AveragedModel` stands for the `n_averaged` models that went into it,
    any other model for one. By that they are weighed where neither `weights` nor `counts` are
    given; an exponential average remembers fewer models than it counts, so give it weights.

    - `model`: receives the average; may be one of `models`. The `n_averaged` of an
      `AveragedModel` becomes the number of models that all of them stand for together, from which
      its `update_parameters` goes on. Wrappers' prefixes ("module.") are seen through.
    - `models`: modules or state_dicts with the same names and shapes, which share no memory; or a
      generator, which may load one checkpoint after the other into one network.
    - `weights`: wᵢ, in any proportion; None: as `counts`, or what each model stands for.
    - `counts`: nᵢ, for how much data each model's statistics stand; None: as `weights`, or what
      each model stands for.
    - `batches`: data to estimate the statistics again with, as `recalibrate` takes them.
    - `forward`: how to call the model with one of them.

    Returns how far the models' statistics lie from the merged ones; its `undo()` takes all back.

    Raises `ValueError` for no models, one that is there twice, names or shapes that do not match,
    numbers that are not finite and weights that make no average, `TypeError` for what is neither
    a model nor a state_dict. Whatever is raised, the model is what it was.

    Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and better
    generalization", section 3.2, and its algorithm 1 for the statistics; McMahan et al. 2017,
    "Communication-efficient learning of deep networks from decentralized data", algorithm 1;
    Chan, Golub & LeVeque 1979, eq. 2.1, for the merging.
    """
    into = State.of(model, "model")
    before = [(tensor, tensor.detach().clone()) for tensor in into.everything()]
    with undone_on_failure(model, parameters=True):  # models may load checkpoints into it
        parts = checked_states(models, into)
        numbers = [part.stands_for for part in parts]
        by_weight, by_count = _given("weights", weights, parts), _given("counts", counts, parts)
        shares = _shares(by_weight or by_count or numbers)
        counted = _shares(by_count or by_weight or numbers)
        merged = {path: _merge(path, into, parts, counted) for path in into.statistics()}
        changes = _changes(into, parts, shares, merged)
        if into.n_averaged is not None:
            changes.append((into.n_averaged, torch.tensor(sum(numbers))))
        _copy(changes)
        estimated = None if batches is None else recalibrate(model, batches, forward=forward)
    layers = tuple(_measured(path, model, into, layer) for path, layer in merged.items())
    return Averaging(len(parts), layers, estimated, before)


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """How far the models' statistics lay apart in one layer, over its channels.

    - `shift`: of each model's mean from the merged one, in merged standard deviations (root mean
      square).
    - `stretch`: each model's standard deviation over the merged one (geometric mean).
    - `between`: the part of the merged variance that the means' distance makes up, which an
      average of variances would miss (mean).
    """

    path: str
    shift: tuple[float, ...]
    stretch: tuple[float, ...]
    between: float


@dataclass(frozen=True, eq=False, repr=False)
class Averaging:
    """What `average` did.

    - `models`: how many were averaged.
    - `layers`: how far apart their statistics lay, in the model's order.
    - `recalibration`: how far those estimated again moved from the merged ones; None without
      batches.
    """

    models: int
    layers: tuple[MergedLayer, ...]
    recalibration: Recalibration | None
    _before: list[tuple[Tensor, Tensor]] = field(repr=False)

    def undo(self) -> None:
        """Give the model the weights, statistics and counters back that it had."""
        _copy(self._before)

    def __repr__(self) -> str:
        layers = counted(len(self.layers), "layer")
        title = f"Averaging: {self.models:,} models, statistics of {layers} merged"
        head = ("layer", "means off", "at most", "std", "at most", "between means")
        rows = [
            (
                shown(layer.path),
                f"{min(layer.shift):.2g} σ",
                f"{max(layer.shift):.2g} σ",
                f"×{min(layer.stretch):.3g}",
                f"×{max(layer.stretch):.3g}",
                f"{layer.between:.1%} of var",
            )
            for layer in self.layers
        ]
        text = table(title, head, rows)
        return text if self.recalibration is None else f"{text}\n{self.recalibration!r}"


def _given(
    what: str, weights: Sequence[int | float] | None, parts: Sequence[State]
) -> list[float] | None:
    """The weights as numbers, checked."""
    if weights is None:
        return None
    numbers = [float(weight) for weight in weights]
    if len(numbers) != len(parts):
        raise ValueError(
            f"{what} must hold one number for each of the {len(parts)} models, got {numbers}"
        )
    if not (min(numbers) >= 0 and 0 < sum(numbers) < math.inf):
        raise ValueError(
            f"{what} must be finite, at least 0 and not all 0 to make an average, got {numbers}"
        )
    return numbers


def _shares(numbers: Sequence[int | float]) -> list[float]:
    """Each model's part of the whole."""
    total = sum(numbers)
    return [number / total for number in numbers]


def _changes(
    into: State, parts: Sequence[State], shares: Sequence[float], merged: Mapping[str, _Merged]
) -> list[tuple[Tensor, Tensor]]:
    """The tensors that are averaged or merged, and their values."""
    values: dict[str, Tensor] = {}
    for path, layer in merged.items():
        for name, value in ((path + "running_mean", layer.mean), (path + "running_var", layer.var)):
            values[name] = _rounded(name, value, into.tensors[name])
    for name, tensor in into.tensors.items():
        if name not in values:
            held = [part.tensors[name].detach() for part in parts]
            values[name] = _average(name, tensor, held, shares)
    return [(tensor, values[name]) for name, tensor in into.tensors.items()]


class _Merged(NamedTuple):
    """The moments of all that a layer was given, and each model's: (c,) and (models, c)."""

    mean: Tensor
    var: Tensor
    means: Tensor
    variances: Tensor
    between: float


def _merge(path: str, into: State, parts: Sequence[State], shares: Sequence[float]) -> _Merged:
    like = into.tensors[path + "running_mean"]
    means, variances = (
        torch.stack([_wide(part.tensors[path + name], like) for part in parts])
        for name in ("running_mean", "running_var")
    )
    usable = means.isfinite() & variances.isfinite() & (variances >= 0)
    for place, share in enumerate(shares):
        if share > 0 and not bool(usable[place].all()):
            raise ValueError(
                f"models[{place}] has running statistics in {path + 'running_*'!r} that are no "
                "finite mean and variance; recalibrate that model or leave it out"
            )
    taken = [place for place, share in enumerate(shares) if share > 0]
    # a moment's count is whole: proportions of so many
    counts = torch.tensor([round(shares[place] * 2**40) for place in taken], device=like.device)
    counts = counts.unsqueeze(1).expand(-1, means.shape[1])
    many = Moments(counts, means[taken], variances[taken] * counts)
    whole = many.pool(0)
    alike = ((many.mean == many.mean[0]) & (variances[taken] == variances[taken[0]])).all(0)
    var = variances[taken[0]].where(alike, whole.var())  # to the bit, as the mean is anyhow
    tiny = torch.finfo(var.dtype).tiny
    between = (whole.m2 - many.m2.sum(0)) / whole.m2.clamp(min=tiny)
    return _Merged(whole.mean, var, means, variances, float(between.mean()))


def _average(name: str, into: Tensor, held: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted average of tensors, of floating point ones; of others what stands for it."""
    if name.rpartition(".")[2] == "num_batches_tracked":
        return torch.stack([each.to(into.device) for each in held]).amax(0)
    if not (into.is_floating_point() or into.is_complex()):
        return held[0]
    main = max(range(len(shares)), key=lambda place: shares[place])
    base = _wide(held[main], into)
    total = base.clone()
    for tensor, share in zip(held, shares, strict=True):
        if share > 0:
            other = _wide(tensor, into)
            # where they agree there is nothing to add, be it infinite: a mask has such buffers
            total += share * (other - base).where(other != base, 0)
    return _rounded(name, total, into, kept=base.isinf() & (total == base))


def _rounded(name: str, values: Tensor, into: Tensor, kept: Tensor | None = None) -> Tensor:
    """In the dtype of `into`; what is not finite must be what all models have, `kept`."""
    rounded = values.to(into.dtype)
    broken = ~rounded.isfinite() if kept is None else ~(rounded.isfinite() | kept)
    if bool(broken.any()):
        raise ValueError(
            f"the average of {name!r} is not finite: a model has an infinity or NaN in it, or "
            f"{into.dtype} is too narrow; leave that model out"
        )
    return rounded


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """In the dtype of sums, on the device of `like`."""
    dtype = torch.complex128 if like.is_complex() else accumulator(like)
    return tensor.detach().to(like.device, dtype)


@torch.no_grad()
def _copy(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in changes:
        tensor.copy_(values)


def _measured(path: str, model: nn.Module, into: State, merged: _Merged) -> MergedLayer:
    eps = getattr(model.get_submodule((into.prefix + path).rstrip(".")), "eps", 1e-5)
    sigma = (merged.var + eps).sqrt()
    shift = ((merged.means - merged.mean) / sigma).square().mean(1).sqrt()
    stretch = ((merged.variances + eps).sqrt() / sigma).log().mean(1).exp()
    return MergedLayer(
        path.removesuffix("."), tuple(shift.tolist()), tuple(stretch.tolist()), merged.between
    )

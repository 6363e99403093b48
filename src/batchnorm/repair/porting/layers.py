"""One layer of another framework as torch.nn's: its tensors checked, renamed and turned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.repair.porting.kernels import (
    LINEAR,
    channels_first,
    is_kernel,
    kind_of_kernel,
    turned,
)
from batchnorm.repair.porting.reading import Held, Layer
from batchnorm.repair.porting.sources import TORCH, Source

__all__ = ["Ported", "is_norm", "port_layer", "unbiased"]

STATISTICS = ("running_mean", "running_var")
OF_A_NORM = ("weight", "bias", *STATISTICS)
LIKE_A_NORM = re.compile(r"(?<![a-z])bn(?![a-z])|batch_?norm", re.IGNORECASE)


class Ported(NamedTuple):
    """A layer's values by torch.nn's last names.

    - `names`: what its framework calls each of them; none for one that was filled in.
    - `kernel`: which layer its kernel is of, None without one.
    - `unchanged`: the last names that are not known here.
    """

    values: dict[str, Any]
    names: dict[str, str]
    kernel: str | None
    unchanged: tuple[str, ...]


def is_norm(layer: Layer, source: Source) -> bool:
    """Whether a layer has running statistics."""
    return any(source.names.get(last) in STATISTICS for last in layer)


def port_layer(
    path: str,
    layer: Layer,
    source: Source,
    module: nn.Module | None,
    flattened: Sequence[int] | None,
) -> Ported:
    """A layer as torch.nn's, for `module` where there is one.

    Raises `ValueError` for a batch norm that is incomplete, for shapes that do not fit together,
    and for values that are not finite.
    """
    named = _named(layer, source)
    values = {known: held.value for known, held in named.items()}
    names = {known: held.name for known, held in named.items()}
    unchanged: tuple[str, ...] = ()
    kind = None
    if source is not TORCH:  # whose states hold masks and caches, whatever their values
        unchanged = tuple(known for known in named if known not in source.names.values())
        for known in named.keys() - set(unchanged):
            _check_finite(*named[known])
    if is_norm(layer, source):
        _check_norm(path, named, source)
        if flattened is not None:
            norm = [known for known in OF_A_NORM if known in named]
            values |= {known: channels_first(*named[known], flattened) for known in norm}
        values |= _filled(values, module)
        return Ported(values, names, None, unchanged)
    kernels = [last for last, held in layer.items() if is_kernel(last, held.value)]
    if kernels and source is not TORCH:
        kind = kind_of_kernel(path, kernels[0], values["weight"], module, source)
        if flattened is not None and kind == LINEAR:
            values["weight"] = channels_first(*named["weight"], flattened)
        values["weight"] = turned(values["weight"], kind, source)
    elif source is not TORCH:
        _check_is_no_batch_norm(path, named, source)
    if flattened is not None and kind != LINEAR:
        raise ValueError(f"flattened: {path} is no Linear and no batch norm; leave it out")
    return Ported(values, names, kind, unchanged)


def unbiased(path: str, var: Tensor, n: int) -> Tensor:
    """The running variance that unbiased variances of n values would have left: var·n/(n − 1)."""
    if n < 2:
        raise ValueError(
            f"values_per_channel must be at least 2, got {n} for {path}: one value has no "
            "variance. It is batch size × positions"
        )
    return (var.double() * (n / (n - 1))).to(var.dtype)


def _named(layer: Layer, source: Source) -> dict[str, Held]:
    """What a layer holds by torch.nn's last names; what has none keeps its own."""
    named: dict[str, Held] = {}
    for last, held in layer.items():
        is_weight = source is not TORCH and is_kernel(last, held.value)
        known = "weight" if is_weight else source.names.get(last, last)
        if known in named:
            raise ValueError(
                f"{held.name} and {named[known].name} would both be the layer's {known!r}"
            )
        named[known] = held
    return named


def _check_norm(path: str, named: dict[str, Held], source: Source) -> None:
    """A mean and a variance, everything one value a channel, and finite."""
    missing = [known for known in STATISTICS if known not in named]
    if missing:
        there = ", ".join(held.name for held in named.values())
        theirs = next(k for k, v in source.names.items() if v == missing[0])
        raise ValueError(
            f"a batch norm needs a mean and a variance, and {path or 'the layer'} has no "
            f"{theirs!r}, only {there}; pass {source.everything}"
        )
    shape = tuple(named["running_mean"].value.shape)
    for known in OF_A_NORM:
        if known in named:
            name, value = named[known]
            if value.ndim != 1 or tuple(value.shape) != shape:
                raise ValueError(
                    "a batch norm has one value a channel in each of its tensors; "
                    f"{named['running_mean'].name} has shape {shape}, and {name} "
                    f"{tuple(value.shape)}"
                )
            _check_finite(name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if value.is_floating_point() and not value.isfinite().all():
        count = int((~value.isfinite()).sum())
        raise ValueError(
            f"{name} holds {count} of {value.numel()} values that are not finite; the training "
            "that left them had diverged: take an earlier checkpoint"
        )


def _check_is_no_batch_norm(path: str, named: dict[str, Held], source: Source) -> None:
    """A layer normalization has a scale and no statistics; a batch norm by name has lost them."""
    last = path.rpartition(".")[2]
    if named.keys() <= {"weight", "bias"} and LIKE_A_NORM.search(last):
        mean, var = (k for k, v in source.names.items() if v in STATISTICS)
        raise ValueError(
            f"{path} is a batch norm by its name, and has no {mean!r} and {var!r}; its statistics "
            f"are kept apart from what is trained: pass {source.everything}"
        )


def _filled(values: dict[str, Any], module: nn.Module | None) -> dict[str, Tensor]:
    """What a batch norm of PyTorch has and the source left out: γ = 1, β = 0, a count of 0."""
    var: Tensor = values["running_var"]
    neutral = {
        "weight": torch.ones_like(var),
        "bias": torch.zeros_like(var),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
    if module is not None:
        wanted = {known for known in neutral if getattr(module, known, None) is not None}
    elif "weight" in values or "bias" in values:
        wanted = set(neutral)
    else:
        wanted = {"num_batches_tracked"}
    return {k: v for k, v in neutral.items() if k in wanted and k not in values}

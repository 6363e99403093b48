"""The weights of a network in another framework, gathered by layer, as tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.repair.porting.sources import FLAX, TORCH, Source

__all__ = ["Held", "Layer", "Reading", "bare_names", "dotted", "read"]

COLLECTIONS = ("params", "batch_stats")  # of flax.linen
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
EXTRA = "_extra_state"  # torch.nn's name for what is no tensor


class Held(NamedTuple):
    """A value, and what its framework calls it."""

    name: str
    value: Any


Layer = dict[str, Held]
"""What a layer holds, by its framework's last names."""


@dataclass(frozen=True)
class Reading:
    """The layers of a network by path, dots between its segments, and the names left out."""

    layers: dict[str, Layer]
    dropped: tuple[str, ...]


def read(state_dict: Mapping[Any, Any], source: Source) -> Reading:
    """Gather a state by layer, in the order it is in.

    Raises `TypeError` for what is no mapping of names to arrays, `ValueError` for two values of
    one name.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"port takes names with their values, got {type(state_dict).__name__}; for "
            f"{source.title} pass {source.everything}"
        )
    layers: dict[str, Layer] = {}
    dropped = []
    for held, segments in _placed(_flat(state_dict, source), source):
        if segments is None:
            dropped.append(held.name)
            continue
        *path, last = segments
        layer = layers.setdefault(".".join(path), {})
        if last in layer:
            raise ValueError(
                f"{held.name} and {layer[last].name} are one tensor's name, "
                f"{'.'.join(segments)}; pass one of them"
            )
        layer[last] = held._replace(value=_value(held, last, source))
    return Reading(dict(_without_pairs(layers)), tuple(dropped))


def dotted(path: str, source: Source) -> str:
    """A path as people write it, with dots between its segments."""
    return ".".join(_segments(path, source))


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a PyTorch state, and what they are without DDP, torch.compile and other wrappers.

    `module.` is taken off where all names begin with it: a layer may be called so.
    """
    bare = {name: [s for s in name.split(".") if s not in WRAPPERS] for name in names}
    inside = [segments for segments in bare.values() if TORCH.stateful.isdisjoint(segments)]
    if inside and all(len(segments) > 1 and segments[0] == "module" for segments in inside):
        for segments in inside:
            del segments[0]
    return {name: ".".join(segments) for name, segments in bare.items()}


def _segments(name: str, source: Source) -> list[str]:
    return re.split(f"[{re.escape(source.separators)}]", name.removesuffix(":0"))


def _flat(state_dict: Mapping[Any, Any], source: Source) -> Iterator[tuple[list[str], Held]]:
    """Every value with the segments of its name; keys are names, parts of them, or tuples."""
    ahead: list[tuple[list[str], str, Any]] = [([], "", state_dict)]
    while ahead:
        path, name, value = ahead.pop()
        if not isinstance(value, Mapping) or (source is TORCH and path):
            yield path, Held(name, value)
            continue
        inner = []
        for key, each in value.items():
            parts = [str(part) for part in (key if isinstance(key, tuple) else (key,))]
            segments = [s for part in parts for s in _segments(part, source)]
            full = source.separators[0].join([name, *parts] if name else parts)
            inner.append((path + segments, full, each))
        ahead.extend(reversed(inner))


def _placed(
    flat: Iterable[tuple[list[str], Held]], source: Source
) -> Iterator[tuple[Held, list[str] | None]]:
    """Every value with its place in the network, None where it is no part of it."""
    entries = list(flat)
    bare = bare_names(held.name for _, held in entries) if source is TORCH else {}
    is_linen = source is FLAX and any(path[0] in COLLECTIONS for path, _ in entries)
    for path, held in entries:
        is_weight = source.stateful.isdisjoint(path)
        if bare and is_weight:
            yield held, bare[held.name].split(".")
        elif is_linen and is_weight and path[0] in COLLECTIONS:
            yield held, path[1:]
        else:
            yield held, path if is_weight and not is_linen else None


def _value(held: Held, last: str, source: Source) -> Any:
    """The value as a tensor of its own."""
    value = held.value
    if last == EXTRA and source is TORCH:
        return value
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{held.name} lies on the meta device and has no values; load them")
        return value.detach().clone()
    try:
        return _of_array(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{held.name} is no array of numbers, but a {type(value).__name__}; for "
            f"{source.title} pass {source.everything}"
        ) from error


def _of_array(value: Any) -> Tensor:
    if not hasattr(value, "__array__"):
        raise TypeError("not an array")
    import numpy as np  # no dependency: whoever has other arrays than tensors has it

    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # JAX's own, which PyTorch does not take from NumPy
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    if array.dtype.kind not in "biuf":
        raise TypeError(f"of dtype {array.dtype}")
    return torch.from_numpy(np.array(array))


def _without_pairs(layers: dict[str, Layer]) -> Iterator[tuple[str, Layer]]:
    """Keras's separable convolutions as the two that they are in PyTorch."""
    for path, layer in layers.items():
        if {"depthwise_kernel", "pointwise_kernel"} <= layer.keys():
            inside = f"{path}." if path else ""
            rest = {k: held for k, held in layer.items() if not k.endswith("wise_kernel")}
            yield f"{inside}depthwise", {"depthwise_kernel": layer["depthwise_kernel"]}
            yield f"{inside}pointwise", {"kernel": layer["pointwise_kernel"], **rest}
        else:
            yield path, layer

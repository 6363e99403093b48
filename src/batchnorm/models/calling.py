"""How people call models: with tensors, tuples, dictionaries, dataclasses."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from torch import Tensor, nn

__all__ = [
    "Forward",
    "call",
    "copied",
    "half",
    "output_of",
    "set_training",
    "tensors_of",
    "with_tensors",
]

Forward = Callable[[nn.Module, Any], Any]
"""How to call a model with a batch."""


def call(model: nn.Module, batch: Any) -> Any:
    """As trainers do: a dictionary by name, of a tuple or list the first entry, else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if _is_dataclass(batch):
        return model(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def with_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {key: with_tensors(value, change) for key, value in batch.items()}
        return _like(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(with_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(with_tensors(value, change) for value in batch)
    if _is_dataclass(batch):
        names = [f.name for f in dataclasses.fields(batch)]
        changed = {name: with_tensors(getattr(batch, name), change) for name in names}
        return dataclasses.replace(batch, **changed)
    return batch


def copied(values: Any) -> Any:
    """The same values in tensors of their own."""
    return with_tensors(values, lambda tensor: tensor.detach().clone())


def tensors_of(values: Any) -> list[Tensor]:
    """Every tensor in a batch, in arguments, or in what a model returns."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(values, note)
    return found


def half(batch: Any) -> Any:
    """The first half of a batch."""
    return with_tensors(batch, lambda tensor: tensor[: len(tensor) // 2] if tensor.ndim else tensor)


def output_of(result: Any) -> Tensor | None:
    """The first tensor of numbers in what a model returns."""
    if isinstance(result, Tensor):
        return result if result.ndim and result.is_floating_point() else None
    values = result.values() if isinstance(result, Mapping) else result
    if isinstance(values, (tuple, list)) or isinstance(result, Mapping):
        return next((t for value in values if (t := output_of(value)) is not None), None)
    if _is_dataclass(result):
        fields = [getattr(result, f.name) for f in dataclasses.fields(result)]
        return output_of(fields)
    return None


def set_training(model: nn.Module) -> None:
    """Training mode where nobody chose otherwise."""
    if not any(module.training for module in model.modules()):
        model.train()


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """The items in a mapping of the same class, with its attributes, where it can be copied."""
    if type(mapping) is dict or not isinstance(mapping, (dict, UserDict)):
        return items
    changed = copy(mapping)
    for key, value in items.items():  # one by one: a class may keep attributes by them
        changed[key] = value
    return changed


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)

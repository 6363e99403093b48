"""Checkpoints, which are data from strangers: read without running anything of theirs."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["PICKLED", "holds_tensors_alone", "read_tensors"]

PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint by its name; of a safetensors file each read when asked for.

    Nested dictionaries, such as a trainer's `{"state_dict": …, "optimizer": …}`, are searched
    through, and their keys joined by dots.

    Raises `ValueError`, in one line, for a file that is none, is damaged, or holds more than
    tensors and plain values: such a file would run code, and is not loaded.
    """
    try:
        if path.suffix == ".safetensors":
            return _lazily(path)
        return dict(_tensors(_unpickled(path)))
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint at {path}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run code of whoever made it; "
            "save its state_dict() instead"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {_said(error)}") from error


def holds_tensors_alone(path: Path) -> bool:
    """Whether a checkpoint that can be read is a flat dictionary of tensors."""
    if path.suffix == ".safetensors":
        return True
    found = _unpickled(path)
    return isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())


class _lazily(Mapping[str, Tensor]):  # noqa: N801 - used as a function
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = cast("Any", safe_open(path, framework="pt"))  # it has no types
        self._keys = dict.fromkeys(cast("list[str]", self._file.keys()))

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _unpickled(path: Path) -> object:
    """What torch.save wrote, mapped and not read where its format allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that it then reads or refuses
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"cannot read {path}: {_said(error)}") from error


def _tensors(found: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, by its keys; in one that holds itself, once."""
    seen: set[int] = set()
    ahead: list[tuple[str, object]] = [("", found)]
    while ahead:
        path, value = ahead.pop()
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            entries = [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
            ahead.extend(reversed(entries))


def _said(error: Exception) -> str:
    """An exception in one line, and no longer than one."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""What is said of layers by path: their options, and their names in the other framework."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from batchnorm.repair.porting.reading import dotted
from batchnorm.repair.porting.sources import Source

__all__ = ["Renamed", "by_layer", "renamed_paths"]

Renamed: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
"""What layers are called: leading segments of paths and what to put for them, or a function."""

T = TypeVar("T")


def by_layer(
    name: str, option: T | Mapping[str, T] | None, layers: Collection[str], source: Source
) -> dict[str, T]:
    """An option's value for each of the layers that it speaks of.

    Raises `ValueError` for a path that is none of them.
    """
    if option is None:
        return {}
    if not isinstance(option, Mapping):
        return dict.fromkeys(layers, option)
    values = {dotted(path, source): value for path, value in option.items()}
    for path in values:
        if path not in layers:
            raise ValueError(f"{name}: {_unknown(path, layers)}")
    return values


def renamed_paths(paths: Iterable[str], renamed: Renamed, source: Source) -> dict[str, str]:
    """The path in PyTorch of each path; a mapping's longest entry decides.

    Raises `ValueError` for an entry that means no path, `TypeError` for a function that returns
    no string.
    """
    paths = list(paths)
    if renamed is None:
        return {path: path for path in paths}
    if not isinstance(renamed, Mapping):
        return {path: _string(renamed(path), path) for path in paths}
    entries = {tuple(_parts(dotted(old, source))): _parts(new) for old, new in renamed.items()}
    places, used = {}, set()
    for path in paths:
        parts = tuple(_parts(path))
        heads = [parts[:n] for n in range(len(parts), -1, -1)]
        old = next((head for head in heads if head in entries), None)
        used.update(heads)
        new = parts if old is None else [*entries[old], *parts[len(old) :]]
        places[path] = ".".join(new)
    for old in entries:
        if old not in used:
            raise ValueError(f"renamed: {_unknown('.'.join(old), paths)}")
    return places


def _parts(path: str) -> list[str]:
    return path.split(".") if path else []


def _string(path: Any, old: str) -> str:
    if not isinstance(path, str):
        raise TypeError(f"renamed must return a path, got {path!r} for {old!r}")
    return path


def _unknown(path: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.4) or sorted(known)[:3]
    meant = f"; near it is {', '.join(map(repr, close))}" if close else ""
    return f"no layer at {path!r}{meant}"

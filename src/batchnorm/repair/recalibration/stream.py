"""The batches to recalibrate with: how many, and how far along."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any, TypeAlias

from torch import Tensor

from batchnorm.models.calling import with_tensors

__all__ = ["Shown", "Stream", "progress_bar"]


class Stream:
    """Batches up to a limit of samples, the last of them cut to it; counts what it has given.

    A sample is an entry of dimension 0 of a batch's first tensor; other tensors as long are cut
    with it.

    Raises `TypeError` for what is one batch and not an iterable of them, `ValueError` for a limit
    below 1.
    """

    def __init__(self, batches: Iterable[Any], limit: int | None = None) -> None:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of batches, such as a DataLoader, got "
                f"{type(batches).__name__}; put a single batch into a list"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"samples must be at least 1, or None for all there are, got {limit}")
        self._source, self._limit = batches, limit
        self.batches = self.samples = 0

    def __iter__(self) -> Iterator[Any]:
        if self._limit is None:
            for batch in self._source:
                yield self._counted(batch, _samples(batch) or 0)
            return
        for batch in self._source:
            size, left = _samples(batch), self._limit - self.samples
            if size is None:
                raise TypeError(
                    f"samples={self._limit} needs batches that hold tensors to be counted, got "
                    f"{type(batch).__name__}; limit the iterable itself, with itertools.islice"
                )
            if size > left:
                batch, size = _cut(batch, size, left), left
            yield self._counted(batch, size)
            if self.samples == self._limit:  # not one batch more out of a generator
                return

    def __length_hint__(self) -> int:
        return length_hint(self._source) if self._limit is None else 0

    def _counted(self, batch: Any, samples: int) -> Any:
        self.batches += 1
        self.samples += samples
        return batch


def _samples(batch: Any) -> int | None:
    """The size of dimension 0 of the first tensor; None where there is none."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.extend(tensor.shape[:1])
        return tensor

    with_tensors(batch, note)
    return sizes[0] if sizes else None


def _cut(batch: Any, size: int, left: int) -> Any:
    return with_tensors(batch, lambda t: t[:left] if t.shape[:1] == (size,) else t)


Shown: TypeAlias = Callable[[Iterable[Any], str], Iterator[Any]]
"""Iterates, while a progress bar says how far and what for."""


@contextmanager
def progress_bar(progress: bool | None, rank: int = 0) -> Iterator[Shown]:
    """A progress bar on stderr; with None only on rank 0, and where that is a terminal."""
    if not (sys.stderr.isatty() and rank == 0 if progress is None else progress):
        yield lambda batches, purpose: iter(batches)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=progress is None) as bar:
        task = bar.add_task("", total=None)

        def tracked(batches: Iterable[Any], purpose: str) -> Iterator[Any]:
            bar.reset(task, total=length_hint(batches) or None, description=escape(purpose))
            for batch in batches:
                yield batch
                bar.advance(task)

        yield tracked

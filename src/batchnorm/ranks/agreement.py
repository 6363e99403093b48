"""A block that all ranks of a group enter and leave together, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

__all__ = ["Ranks"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Failure:
    """What a rank that failed hands in, in place of what the others wait for."""

    error: str


class Ranks:
    """The ranks of a process group; the default group's where None, if there is one; else one.

    Raises `ValueError` on a rank outside the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        is_alone = group is None and not (dist.is_available() and dist.is_initialized())
        self._group = group
        self._size = 1 if is_alone else dist.get_world_size(group)
        self.rank = 0 if is_alone else dist.get_rank(group)
        self._awaited = True  # whether others wait for this rank
        if self._size < 1:
            raise ValueError("this rank is not in the group that it was given; call it on those in")

    def gather(self, mine: _T) -> list[_T]:
        """What every rank has, in the order of the ranks; all of them must call this.

        Raises `RuntimeError` where another rank failed, or does not come.
        """
        if self._size == 1:
            return [mine]
        everyone: list[Any] = [None] * self._size
        self._awaited = False  # should this raise
        try:
            dist.all_gather_object(everyone, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self._size} waited for the others in vain: all ranks of the "
                f"group must make this call, and be alive ({str(error).splitlines()[0]})"
            ) from error
        for rank, theirs in enumerate(everyone):
            if isinstance(theirs, _Failure) and rank != self.rank:
                raise RuntimeError(f"rank {rank} of {self._size} failed with {theirs.error}")
        self._awaited = True
        return cast("list[_T]", everyone)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends on all ranks, or raises on all."""
        try:
            yield
        except BaseException as error:
            if self._awaited:
                self._tell(error)
            raise
        self.gather(None)

    def _tell(self, error: BaseException) -> None:
        with suppress(RuntimeError):  # another failed too: this rank's own error says more
            self.gather(_Failure(f"{type(error).__name__}: {error}"))

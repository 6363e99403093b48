"""In which order a run's layers asked other ranks."""

from __future__ import annotations

from collections import Counter, deque

from batchnorm.audit.rank_view import Calls
from batchnorm.audit.synchronizing import group_name, ranks_of
from batchnorm.statistics import Sync

__all__ = ["SyncLog"]

KEPT = 1024  # calls of each group of ranks


class SyncLog:
    """The training-mode calls of layers that synchronize, in their order, by whom they ask."""

    def __init__(self) -> None:
        # by the group's name: no group is kept
        self._groups: dict[str, tuple[tuple[int, ...], Counter[str], deque[str]]] = {}

    def note(self, sync: Sync, name: str) -> tuple[int, ...]:
        """Count a call that has begun, of a layer by its name; returns the ranks that it asks."""
        group = group_name(sync)
        known = self._groups.get(group)
        if known is None:
            known = self._groups[group] = ranks_of(sync), Counter(), deque(maxlen=KEPT)
        ranks, counts, last = known
        counts[name] += 1
        last.append(name)
        return ranks

    def calls(self) -> tuple[Calls, ...]:
        """The calls up to now."""
        return tuple(
            Calls(name, ranks, dict(counts), tuple(last))
            for name, (ranks, counts, last) in list(self._groups.items())
        )

"""Which collectives a block calls, and how much each sends to every other rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist

# every way in which numbers could leave
_NAMES = [
    name
    for name in (
        *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object"),
        *("all_reduce", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv"),
        *("broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend"),
        *("recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
    )
    if hasattr(dist, name)
]


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Their names, with the bytes that one other rank gets of this one."""
    sent: list[tuple[str, int]] = []

    def counting(name: str, collective: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            tensor = args[1] if name == "all_to_all_single" else args[0]
            share = dist.get_world_size(kwargs.get("group")) if name == "all_to_all_single" else 1
            sent.append((name, getattr(tensor, "nbytes", 0) // share))
            return collective(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{n: counting(n, getattr(dist, n)) for n in _NAMES}):
        yield sent

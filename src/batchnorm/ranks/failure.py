"""A collective that failed: who came, who did not, and why that may be."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

__all__ = ["SyncError", "failure"]

# Those who fail together fail within moments of each other: one closes its connections, and
# the others notice.
_PATIENCE = 1.0  # seconds


class SyncError(RuntimeError):
    """Synchronized statistics could not be computed: a rank was missing, or in another layer.

    The message names the layer, the ranks, and the likely cause. The running statistics are
    those of the last complete step; the process group should not be used again.
    """


def failure(
    group: dist.ProcessGroup | None, where: str, error: Exception | None, others: Sequence[int] = ()
) -> SyncError:
    """The error of this rank, after asking the others what they saw.

    - `where`: what this rank was doing, "the forward of ResNet.bn1".
    - `error`: the backend's; None where all came, but `others` were doing something else.
    """
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    me = dist.get_rank()
    places = _ask(group, ranks, me, where)
    missing = [rank for rank in ranks if rank not in places]
    said = f"{where} failed on rank {me} of {_listed(ranks)}: "
    if error is None:
        there = [f"rank {ranks[i]} was in {places.get(ranks[i], 'another')}" for i in others]
        said += (
            f"{'; '.join(there)}. The ranks' models differ, or one of them skipped a layer, called "
            "one more, or has a part in eval mode"
        )
    elif missing:
        said += f"{_ranks(missing)} did not take part. {_cause(error, group, len(missing))}"
    else:
        elsewhere = {rank: place for rank, place in places.items() if place != where}
        there = [f"rank {rank} was in {place}" for rank, place in elsewhere.items()]
        said += f"{'; '.join(there) or 'all ranks were there'}. " + (
            "One of them skipped a layer or called one more, has a part in eval mode, or left it "
            "out of its loss"
            if there
            else "The network between them failed"
        )
    told = "" if error is None else f" ({str(error).splitlines()[0][:200]})"
    return SyncError(
        f"{said}. The running statistics are those of the last complete step; restart all ranks "
        f"from their last checkpoint{told}"
    )


def _cause(error: Exception, group: dist.ProcessGroup | None, missing: int) -> str:
    """Why ranks did not come, by how the backend noticed."""
    they, have = ("It", "has") if missing == 1 else ("They", "have")
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return (
            f"{they} did not come within the group's time limit: {they.lower()} may be in eval "
            f"mode, skip this layer, {have} run out of batches before the others (let a rank "
            "without data pass on empty batches, or join with "
            "Join(..., throw_on_early_termination=True)), hang, or be slower than the limit "
            "(init_process_group(timeout=...))"
        )
    return (
        f"The connection was closed: {they.lower()} died, was killed, or raised an error of "
        "its own, which its log tells"
    )


def _ask(
    group: dist.ProcessGroup | None, ranks: Sequence[int], me: int, where: str
) -> Mapping[int, str]:
    """Where each rank was that failed too; in a thread, for a dead store may not answer."""
    places = {me: where}
    asking = threading.Thread(target=_exchange, args=(group, ranks, me, where, places), daemon=True)
    asking.start()
    asking.join(2 * _PATIENCE)
    return dict(places)


def _exchange(
    group: dist.ProcessGroup | None,
    ranks: Sequence[int],
    me: int,
    where: str,
    places: dict[int, str],
) -> None:
    name = getattr(group if group is not None else dist.group.WORLD, "group_name", "")
    with suppress(Exception):  # without a store the error says less
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"batchnorm/failed/{name}/{me}", json.dumps(where))
        end = time.monotonic() + _PATIENCE
        while len(places) < len(ranks) and time.monotonic() < end:
            for rank in ranks:
                key = f"batchnorm/failed/{name}/{rank}"
                if rank not in places and store.check([key]):
                    places[rank] = json.loads(store.get(key))
            time.sleep(0.02)


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _listed(ranks: Sequence[int]) -> str:
    """`0 to 7`, or all of them."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))

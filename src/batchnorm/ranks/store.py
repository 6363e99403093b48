"""Notes that ranks leave for each other where all can read them, also when nobody else listens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["LARGEST", "Board", "Patience"]

LARGEST = 2**22  # bytes of a note; a store closes the connection of who sends more than 2^23

_CONNECTING = timedelta(seconds=10)
_STEP = 0.05  # seconds between two looks
_distributed: Any = dist  # mypy does not see its stores


class Patience:
    """A time limit, which may be cut short from another thread."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()

    def cut(self, seconds: float) -> None:
        """Wait so many seconds more at most."""
        with self._lock:
            self._end = min(self._end, time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether to wait no longer."""
        return time.monotonic() > self._end


class Board:
    """A board on which each of several ranks pins notes, and reads those of the others.

    It is a store of torch.distributed, and no process group: it works where a group is broken or
    destroyed, nobody has to come at the same time, and nobody waits longer than he wants to.

    - `store`: of `torch.distributed`, which all of them reach.
    - `rank`, `size`: this one's number among the ranks, and how many they are.
    - `topic`: what the notes are about; boards of other topics do not see them.
    """

    def __init__(self, store: Any, rank: int, size: int, topic: str) -> None:
        self._store = _distributed.PrefixStore(f"batchnorm/{topic}", store)
        self.rank = rank
        self.size = size

    @classmethod
    def of_torchrun(cls, topic: str) -> Board | None:
        """The ranks that torchrun started; None where it started one, or shares no store.

        The store is the launcher's, and outlives the ranks.

        Raises `RuntimeError` where the launcher does not answer.
        """
        if not (dist.is_available() and _shares_its_store(os.environ)):
            return None
        environment = os.environ
        store = _distributed.TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=False,
            timeout=_CONNECTING,
        )
        # a restart has the same store
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(store, rank, size, f"{topic}/{attempt}")

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, topic: str) -> Board:
        """The ranks of a process group."""
        name = getattr(group, "group_name", "")
        store = _distributed.distributed_c10d._get_default_store()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return cls(store, rank, size, f"{topic}/{name}")

    def pin(self, name: str, note: bytes) -> None:
        """Leave a note, in the place of the last one of this name."""
        if len(note) > LARGEST:
            raise ValueError(f"a note has at most {LARGEST} bytes, got {len(note)} for {name!r}")
        self._store.set(_key(name, self.rank), _THERE + note)

    def take_down(self, name: str) -> None:
        """Take this rank's note away, if there is one."""
        # not deleted: who has just seen that there is one would wait for it
        self._store.set(_key(name, self.rank), b"")

    def read(self, name: str, rank: int) -> bytes | None:
        """A rank's note; None where there is none yet."""
        note = self._held(_key(name, rank))
        return note[len(_THERE) :] if note else None

    def collect(
        self, name: str, patience: Patience, of: Sequence[int] | None = None
    ) -> dict[int, bytes]:
        """The notes of all ranks, or of some, by rank: those that come in time."""
        found: dict[int, bytes] = {}
        for rank in range(self.size) if of is None else of:
            while (note := self.read(name, rank)) is None and not patience.is_over:
                time.sleep(_STEP)
            if note is not None:
                found[rank] = note
        return found

    def claim(self, name: str) -> bool:
        """Whether this rank is the first to ask for it."""
        mine = str(self.rank)
        holder: bytes = self._store.compare_set(_holder(name), "", mine)
        return holder == mine.encode()

    def await_claim(self, name: str, patience: Patience) -> None:
        """Wait until somebody has asked for it, or it takes too long."""
        while not patience.is_over and not self._held(_holder(name)):
            time.sleep(_STEP)

    def release(self, name: str) -> None:
        """Let it be claimed again."""
        self._store.set(_holder(name), b"")

    def meet(self, name: str, note: bytes, wait: float) -> list[bytes]:
        """Every rank's note, in the order of the ranks, once all have come here.

        The first rank waits for the others, and says whether all came: they go on together, or
        none does. A name serves one meeting.

        Raises on every rank that came: `TimeoutError`, naming those that did not within `wait`
        seconds; `RuntimeError` where one has called `fail` instead.
        """
        self.pin(name, _CAME + note)
        patience = Patience(wait)
        if self.rank == 0:
            came = self.collect(name, patience)
            missing = [rank for rank in range(self.size) if rank not in came]
            self.pin(_verdict(name), ",".join(map(str, missing)).encode())
        else:
            told = self.collect(_verdict(name), patience, [0])
            if 0 not in told:  # the first one did not come, or is as late as this one
                told = self.collect(_verdict(name), Patience(1.0), [0])
            missing = [int(rank) for rank in told.get(0, b"0").decode().split(",") if rank]
            came = self.collect(name, Patience(0.0))
        for rank, theirs in came.items():
            if theirs.startswith(_FAILED):
                said = theirs[len(_FAILED) :].decode(errors="replace")
                raise RuntimeError(f"rank {rank} of {self.size} failed with {said}")
        if missing:
            self.take_down(name)  # who comes now comes too late
            raise TimeoutError(_missed(missing, self.rank, self.size, wait))
        return [came[rank][len(_CAME) :] for rank in range(self.size)]

    def fail(self, name: str, why: str) -> None:
        """Come to a meeting with a failure, and do not wait for anybody."""
        self.pin(name, _FAILED + why.encode()[:2000])
        if self.rank == 0:
            self.pin(_verdict(name), b"0")

    def _held(self, key: str) -> bytes:
        """What the store holds, without waiting for it."""
        if not self._store.check([key]):
            return b""
        value: bytes = self._store.get(key)
        return value


_THERE = b"!"  # before every note: empty ones are there too
_CAME, _FAILED = b"+", b"-"


def _shares_its_store(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process beside others."""
    wanted = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    return (
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and all(name in environment for name in wanted)
        and int(environment["WORLD_SIZE"]) > 1
    )


def _key(name: str, rank: int) -> str:
    return f"{name}/{rank}"


def _holder(name: str) -> str:
    return f"{name}/holder"


def _verdict(name: str) -> str:
    """The first rank's, on who is missing."""
    return f"{name}/missing"


def _missed(missing: Sequence[int], rank: int, size: int, wait: float) -> str:
    if rank in missing:
        return f"rank {rank} of {size} came after {wait:g} seconds, when the others had gone on"
    who = ", ".join(map(str, missing))
    few = "rank" if len(missing) == 1 else "ranks"
    return f"{few} {who} of {size} did not come within {wait:g} seconds"

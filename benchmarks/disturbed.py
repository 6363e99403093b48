"""The training that `faults.py` disturbs, one process of it, and what may befall its ranks."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import time
from datetime import timedelta
from functools import cache, partial
from inspect import signature
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo  # DistributedDataParallel imports it, and the processes are forked
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm2d, Sync, SyncError, undo_step
from batchnorm.functional import synchronized_batch_norm
from batchnorm.moments import Moments

STEPS, SAVING, BATCH = 12, 3, 8
LIMIT = 3.0  # seconds: the group's
STARTING = 60.0
LAYERS = 4
# its name since torch 2.13, which warns of the other
FLAGS = signature(DistributedDataParallel).parameters
BROADCAST = "forward_sync_buffers" if "forward_sync_buffers" in FLAGS else "broadcast_buffers"

KILLED, OUTSIDE = "killed in a step", "killed at any moment, from outside"
RAISES, OUT = "raises an error of its own", "runs out of batches, and ends"
SKIPS, LAYER_IN_EVAL = "skips a layer", "has a layer in eval mode"
IN_EVAL, SLOW = "is in eval mode", "comes later than the time limit"
# how often each is drawn; the last two take the time limit
KINDS = {KILLED: 5, OUTSIDE: 5, RAISES: 3, OUT: 1, SKIPS: 2, LAYER_IN_EVAL: 1, IN_EVAL: 1, SLOW: 1}


class Network(nn.Module):
    """8×8 images to ten logits; three layers of one width can be taken for each other."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(BatchNorm2d, act="relu", statistics=Sync())
        widths = (1, 8, 8, 8, 16)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(norm(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 10)
        self.skipped: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = convolution(x)
            if i != self.skipped:
                x = norm(x)
        return self.head(x.mean((2, 3)))


class Training:
    def __init__(self, broadcast: bool, checkpoint: Path) -> None:
        torch.manual_seed(0)
        self.network, self.done = Network().double(), 0
        self.model = DistributedDataParallel(self.network, **{BROADCAST: broadcast})
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)
        self.checkpoint = checkpoint
        if checkpoint.exists():
            saved = torch.load(checkpoint)
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.done = saved["done"]

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.done += 1
        if self.done % SAVING == 0 and dist.get_rank() == 0:
            self.save()

    def save(self) -> None:
        part = self.checkpoint.with_suffix(".part")
        held = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**held, "done": self.done}, part)
        part.replace(self.checkpoint)

    def held(self) -> Tensor:
        momenta = [s["momentum_buffer"] for s in self.optimizer.state.values() if s]
        return torch.cat(
            [t.flatten().double() for t in (*self.network.state_dict().values(), *momenta)]
        )

    def digest(self) -> str:
        return hashlib.sha256(self.held().numpy().tobytes()).hexdigest()


class Fault(NamedTuple):
    """What befalls a rank.

    - `kind`: one of `KINDS`.
    - `step`, `point`, `layer`: where; from outside it is `moment`, a part of the whole time.
    """

    kind: str
    rank: int
    step: int
    point: str
    layer: int
    moment: float

    @classmethod
    def drawn(cls, numbers: random.Random, world: int) -> Fault:
        kinds, weights = zip(*KINDS.items(), strict=True)
        (kind,) = numbers.choices(kinds, weights)
        point = numbers.choice(("before", "forward", "after", "backward", "optimizer"))
        return cls(
            kind,
            numbers.randrange(world),
            numbers.randrange(STEPS),
            point,
            numbers.randrange(LAYERS),
            numbers.random(),
        )

    def befall(self, training: Training) -> None:
        network, norm = training.network, training.network.norms[self.layer]
        if self.kind in (KILLED, RAISES):
            at = die if self.kind == KILLED else fail
            if self.point == "before":
                at()
            elif self.point == "forward":
                norm.register_forward_pre_hook(at)
            elif self.point == "after":
                norm.register_forward_hook(at)
            elif self.point == "backward":
                norm.weight.register_hook(at)
            else:
                training.optimizer.register_step_pre_hook(at)
        elif self.kind == SKIPS:
            network.skipped = self.layer
        elif self.kind == LAYER_IN_EVAL:
            norm.eval()
        elif self.kind == IN_EVAL:
            network.eval()
        elif self.kind == SLOW:
            time.sleep(LIMIT + 0.5)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: object) -> None:
    raise ZeroDivisionError("a bug of this rank")


class Ended(NamedTuple):
    """What a rank says at its end.

    - `done`: the steps that it completed; `digests` are its states after these, by step.
    - `held`, `digest`: its state at the end, a step that failed taken back.
    - `waited`: seconds in its last step.
    """

    done: int
    digests: dict[int, str]
    held: NDArray[np.float64]
    digest: str
    error: str
    message: str
    waited: float


class Place(NamedTuple):
    """Of a rank in a run.

    - `port`: of a store that rank 0 keeps; None where a file in the folder is the store.
    """

    rank: int
    world: int
    folder: Path
    broadcast: bool
    port: int | None

    def join(self) -> Training:
        if self.port is None:
            store: Any = dist.FileStore(str(self.folder / "store"), self.world)
        else:
            at = "127.0.0.1", self.port, self.world, self.rank == 0
            store = dist.TCPStore(*at, timeout=timedelta(seconds=STARTING))
        dist.init_process_group(
            "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=LIMIT),
        )
        training = Training(self.broadcast, self.folder / "checkpoint.pt")
        dist.barrier()
        return training


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float64).unsqueeze(1) / 16
    return images[order], torch.tensor(data.target)[order]


def trained(training: Training, place: Place, fault: Fault | None) -> Ended:
    """One rank's training, up to its end or an error."""
    images, labels = digits()
    digests = {training.done: training.digest()}
    start = time.perf_counter()
    error = None
    try:
        while training.done < STEPS:
            if fault is not None and (fault.rank, fault.step) == (place.rank, training.done):
                if fault.kind == OUT:
                    break
                fault.befall(training)
            start = time.perf_counter()
            first = (training.done * place.world + place.rank) * BATCH
            training.step(images[first : first + BATCH], labels[first : first + BATCH])
            digests[training.done] = training.digest()
    except Exception as raised:
        error = raised
        if not isinstance(error, SyncError):
            undo_step()
    waited = time.perf_counter() - start
    held, digest = training.held().numpy(), training.digest()
    name = "" if error is None else type(error).__name__
    return Ended(training.done, digests, held, digest, name, str(error), waited)


def process(place: Place, fault: Fault | None, pipe: Connection) -> None:
    torch.set_num_threads(1)
    training = place.join()
    pipe.send(None)
    pipe.send(trained(training, place, fault))


class Alone:
    """In place of other ranks."""

    def merged(self, mine: Moments) -> Moments:
        return mine

    def total(self, sums: Tensor) -> Tensor:
        return sums


def load_kernels() -> None:
    """Once, before the processes are forked."""
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    y, _ = synchronized_batch_norm(x, peers=Alone(), act="relu")
    y.sum().backward()
    BatchNorm2d(2, act="relu").double()(x).sum().backward()

"""Ranks that die, raise, stay away or come late: what becomes of the others.

Nobody waits beyond the group's time limit; each error says where, who and why; running statistics
are those of the last complete step, to the bit; and training goes on from there as if nothing had
been.
"""

import hashlib
import os
import re
import signal
import threading
import time
from functools import partial
from inspect import signature
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm1d, BatchNorm2d, Sync, SyncError, undo_step
from faults import die, outcomes

pytestmark = pytest.mark.as_installed

WORLD, BAD = 3, 2
STEPS, SAVED, FAULT = 5, 2, 3  # the step that fails, from 0 on
LIMIT = 3.0
SLACK = 2.0  # beyond it: asking the others, and a busy machine

# its name since torch 2.13, which warns of the other; rank 0's buffers are everybody's already
FLAGS = signature(DistributedDataParallel).parameters
WITHOUT_BROADCAST = {
    "forward_sync_buffers" if "forward_sync_buffers" in FLAGS else "broadcast_buffers": False
}


class Net(nn.Module):
    """Three layers: two of four channels, one of six."""

    def __init__(self):
        super().__init__()
        norm = partial(BatchNorm2d, act="relu", statistics=Sync())
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), norm(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 6, 3), norm(6)
        self.head = nn.Linear(6, 3)
        self.skips = ()

    def forward(self, x):
        for i in (1, 2, 3):
            x = getattr(self, f"conv{i}")(x)
            if i not in self.skips:
                x = getattr(self, f"bn{i}")(x)
        return self.head(x.mean((2, 3)))


class Training:
    """A small one; every rank's state after each complete step is known by its digest."""

    def __init__(self, resume=None, alone=False):
        torch.manual_seed(0)
        self.net, self.done = Net().double(), 0
        self.model = self.net
        if not alone:
            self.model = DistributedDataParallel(self.net, **WITHOUT_BROADCAST)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
        if resume is not None and Path(resume).exists():
            saved = torch.load(resume)
            self.net.load_state_dict(saved["net"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.done = saved["done"]
        self.trail = [self.digest()]

    def step(self, rank, size=4):
        self.optimizer.zero_grad()
        self.model(_batch(self.done, rank)[:size]).square().sum().backward()
        self.optimizer.step()
        self.done += 1
        self.trail.append(self.digest())

    def held(self):
        momenta = [self.optimizer.state[p].get("momentum_buffer") for p in self.net.parameters()]
        return [*self.net.state_dict().values(), *(m for m in momenta if m is not None)]

    def digest(self):
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.held())).hexdigest()

    def values(self):
        return torch.cat([t.flatten().double() for t in self.held()]).tolist()

    def save(self, path):
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "done": self.done}, f"{path}.part")
        Path(f"{path}.part").replace(path)


def _batch(step, rank):
    numbers = torch.Generator().manual_seed(9 * step + rank)
    return torch.randn(4, 1, 9, 9, generator=numbers, dtype=torch.float64)


def _raise(*_):
    raise ZeroDivisionError("a bug of its own")


def _late_by(seconds):
    return lambda training: time.sleep(seconds)


FAULTS = {
    "none": lambda training: None,
    "killed in forward": lambda t: t.net.bn2.register_forward_hook(lambda *_: die()),
    "killed in backward": lambda t: t.net.bn2.weight.register_hook(lambda _: die()),
    "killed at the end of backward": lambda t: t.net.conv1.weight.register_hook(lambda _: die()),
    "killed in the optimizer": lambda t: t.optimizer.register_step_pre_hook(lambda *_: die()),
    "raises in forward": lambda t: t.net.bn2.register_forward_hook(_raise),
    "raises in backward": lambda t: t.net.bn2.weight.register_hook(_raise),
    "skips one, the next is like it": lambda t: setattr(t.net, "skips", (1,)),
    "skips one, the next is wider": lambda t: setattr(t.net, "skips", (2,)),
    "skips the last": lambda t: setattr(t.net, "skips", (3,)),
    "is in eval mode": lambda t: t.model.eval(),
    "has a layer in eval mode": lambda t: t.net.bn2.eval(),
    "is slow": _late_by(1.0),
    "is too slow": _late_by(LIMIT + 0.6),
}


def _train(rank, world, fault="none", bad=BAD, path=None):
    """What a rank saw of a training with a fault; the last state that it can save."""
    training, error = Training(path), None
    while training.done < STEPS:
        if rank == bad and training.done == FAULT:
            FAULTS[fault](training)
        start = time.perf_counter()
        try:
            training.step(rank)
        except RuntimeError as raised:
            error = raised
            break
        if path is not None and rank == 0 and training.done == SAVED:
            training.save(path)
    return _told(training, error, time.perf_counter() - start)


def _told(training, error, waited=0.0):
    """What becomes of the step that failed."""
    moved = False
    if error is not None and not isinstance(error, SyncError):
        moved = training.digest() != training.trail[-1]
        undo_step()
    return {
        "trail": training.trail,
        "state": training.digest(),
        "error": type(error).__name__,
        "message": str(error),
        "waited": waited,
        "moved": moved,
        "values": training.values(),
    }


@pytest.fixture(scope="module")
def undisturbed():
    trails = [rank.said["trail"] for rank in outcomes(WORLD, _train, limit=30)]
    assert len(trails[0]) == len(set(trails[0])) == STEPS + 1
    assert trails == [trails[0]] * WORLD
    return trails[0]


def _survivors(ranks, undisturbed, complete=FAULT, bad=BAD):
    """What ranks said: they hold the last complete step, and have not waited too long."""
    said = {number: rank.said for number, rank in enumerate(ranks) if number != bad}
    for number, each in said.items():
        assert each is not None, ranks[number]
        assert each["trail"] == undisturbed[: complete + 1]
        assert each["state"] == undisturbed[complete]
        assert each["waited"] < LIMIT + SLACK, (number, each["message"])
    return said


def _named(errors, where, told, ranks="0 to 2"):
    for rank, error in errors.items():
        assert error["error"] == "SyncError", error
        assert re.match(rf"{where} failed on rank {rank} of {ranks}: {told}", error["message"])
        assert re.search("The running statistics are those of the last compl", error["message"])


GONE = rf"rank {BAD} is gone\. It died, was killed, or raised an error of its own"
ABSENT = rf"rank {BAD} did not come within the group's time limit\. It may "
TOO_LATE = "came later than the group's time limit allows"


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("killed in forward", "the forward of Net.bn3"),
        ("raises in backward", "the backward of Net.bn1"),
    ],
)
def test_who_dies_in_mid_step_is_named_at_once(fault, where, undisturbed):
    ranks = outcomes(WORLD, _train, fault, limit=30)
    _named(_survivors(ranks, undisturbed), where, GONE)
    assert ranks[BAD].code == (-signal.SIGKILL if "killed" in fault else 0)


def test_training_goes_on_from_the_last_checkpoint(tmp_path):
    """With two ranks to the bit; DDP adds up three in another order in its first step."""
    for world, tolerance in ((2, 0.0), (WORLD, 1e-12)):
        path, bad = str(tmp_path / f"{world}.pt"), world - 1
        undisturbed = outcomes(world, _train, limit=30)[0].said
        ranks = outcomes(world, _train, "killed in backward", bad, path, limit=30)
        errors = _survivors(ranks, undisturbed["trail"], bad=bad)
        among, gone = ("0, 1", "rank 1 is gone") if world == 2 else ("0 to 2", GONE)
        _named(errors, "the backward of Net.bn1", gone, among)
        for rank in outcomes(world, _train, "none", bad, path, limit=30):
            assert len(rank.said["trail"]) == STEPS + 1 - SAVED
            assert rank.said["trail"][0] == undisturbed["trail"][SAVED]
            np.testing.assert_allclose(
                rank.said["values"], undisturbed["values"], tolerance, tolerance
            )


def test_where_ddp_notices_first_the_step_is_put_back_by_hand(undisturbed):
    """After the last layer's collective, or where a bucket of gradients fails before."""
    ranks = outcomes(WORLD, _train, "killed at the end of backward", limit=30)
    for error in _survivors(ranks, undisturbed).values():
        assert error["error"] == "RuntimeError"
        assert error["moved"]


def test_who_dies_between_two_steps_takes_nothing_back(undisturbed):
    ranks = outcomes(WORLD, _train, "killed in the optimizer", limit=30)
    _named(_survivors(ranks, undisturbed, FAULT + 1), "the forward of Net.bn1", GONE)


def test_the_rank_that_keeps_the_store_may_die(undisturbed):
    ranks = outcomes(WORLD, _train, "killed in forward", 0, limit=30, first_keeps_store=True)
    gone = "rank 0 is gone, and with it the store that would tell of others. One of them died"
    _named(_survivors(ranks, undisturbed, bad=0), "the forward of Net.bn3", gone)


@pytest.mark.parametrize(
    ("fault", "here", "there"),
    [
        ("skips one, the next is like it", "the forward of Net.bn1", "the forward of Net.bn2"),
        ("skips one, the next is wider", "the forward of Net.bn2", "the forward of Net.bn3"),
        ("skips the last", "the forward of Net.bn3", "the backward of Net.bn2"),
        ("has a layer in eval mode", "the forward of Net.bn2", "the forward of Net.bn3"),
    ],
)
def test_who_is_in_another_layer_is_told_at_once(fault, here, there, undisturbed):
    ranks = outcomes(WORLD, _train, fault, limit=30)
    errors = _survivors(ranks, undisturbed, bad=None)
    causes = "The ranks' models differ, or one of them skipped a layer, .* part in eval mode"
    _named({BAD: errors.pop(BAD)}, there, rf"ranks 0, 1 were in {here}\. {causes}")
    _named(errors, here, rf"rank {BAD} was in {there}\. {causes}")


def test_who_is_in_eval_mode_is_waited_for_up_to_the_limit(undisturbed):
    ranks = outcomes(WORLD, _train, "is in eval mode", limit=LIMIT)
    errors = _survivors(ranks, undisturbed, bad=None)
    assert errors.pop(BAD)["error"] == "RuntimeError"  # DDP's: nobody averages its gradients
    _named(errors, "the forward of Net.bn1", ABSENT + "be in eval mode")


def test_who_is_slow_is_waited_for(undisturbed):
    for rank in outcomes(WORLD, _train, "is slow", limit=LIMIT):
        assert rank.said["trail"] == undisturbed


def test_who_is_too_slow_is_told_so_itself(undisturbed):
    ranks = outcomes(WORLD, _train, "is too slow", limit=LIMIT)
    errors = _survivors(ranks, undisturbed, bad=None)
    where = "the forward of Net.bn1"
    _named({BAD: errors.pop(BAD)}, where, rf"rank {BAD}, this one, {TOO_LATE}\. .* raise the limit")
    _named(errors, where, rf"(rank {BAD} {TOO_LATE}|{ABSENT})")


def _join(rank, world, stops):
    """The last rank's loader is shorter by two batches."""
    training = Training()
    try:
        with Join([training.model], throw_on_early_termination=stops):
            for _ in range(FAULT if rank == BAD else STEPS):
                training.step(rank)
    except RuntimeError as error:
        return _told(training, error)


def test_who_has_fewer_batches_ends_all_in_time(undisturbed):
    """DDP's Join shadows DDP's collectives, and not those of layers."""
    start = time.perf_counter()
    ranks = outcomes(WORLD, _join, False, limit=LIMIT)
    errors = _survivors(ranks, undisturbed, bad=None)
    assert errors.pop(BAD)["error"] == "RuntimeError"  # its shadows wait for nothing
    _named(errors, "the forward of Net.bn1", ABSENT + ".* be out of batches")
    assert "Join(..., throw_on_early_termination=True)" in errors[0]["message"]
    for rank, error in _survivors(outcomes(WORLD, _join, True), undisturbed, bad=None).items():
        assert error["error"] == "RuntimeError"
        assert "xhausted" in error["message"], rank
        assert not error["moved"]
    assert time.perf_counter() - start < 10 * LIMIT


SIZES = [(4, 4, 4), (4, 1, 3), (4, 4, 0), (1, 0, 0), (0, 0, 3)]  # of batches, by step and rank


def _uneven(rank, world):
    training = Training()
    for sizes in SIZES:
        training.step(rank, sizes[rank])
    return training.values()


def test_a_rank_without_data_passes_on_empty_batches():
    """All of it is one process with the batches that there were."""
    alone = Training(alone=True)
    for step, sizes in enumerate(SIZES):
        batches = [_batch(step, rank)[:size] for rank, size in enumerate(sizes)]
        alone.optimizer.zero_grad()
        (alone.net(torch.cat(batches)).square().sum() / WORLD).backward()
        alone.optimizer.step()
    for rank in outcomes(WORLD, _uneven):
        np.testing.assert_allclose(rank.said, alone.values(), 1e-12, 1e-12)


def _interrupted(rank, world):
    """Ctrl-C while a rank waits for another."""
    training = Training()
    training.step(rank)
    if rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(1)
    try:
        training.step(rank)
    except (KeyboardInterrupt, RuntimeError) as error:
        return _told(training, error)


def test_ctrl_c_takes_effect_when_the_others_come():
    first, second = (rank.said for rank in outcomes(2, _interrupted, limit=30))
    assert first["error"] == "KeyboardInterrupt"
    _named({1: second}, r"the forward of Net.bn\d", "rank 0 is gone", "0, 1")
    for rank in (first, second):
        assert len(rank["trail"]) == 2
        assert rank["state"] == rank["trail"][-1]


def _adversaries(rank, world):
    """A generator's pass is still to go back while the discriminator takes its step."""
    torch.manual_seed(0)
    norm = partial(BatchNorm1d, statistics=Sync())
    generator = nn.Sequential(nn.Linear(3, 4), norm(4))
    discriminator = nn.Sequential(nn.Linear(4, 4), norm(4), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (generator, discriminator)]
    trail = []
    try:
        for i in range(3):
            made = generator(torch.randn(5, 3))
            (discriminator(made.detach()) - discriminator(torch.randn(5, 4))).mean().backward()
            optimizers[1].step()
            trail.append(_means(generator, discriminator))
            if rank == 1 and i == 2:
                discriminator[0].weight.register_hook(lambda _: die())
            discriminator(made).mean().backward()
            optimizers[0].step()
            complete = _means(generator)
    except SyncError as error:
        told = _means(generator, discriminator)
        return told == [complete[0], trail[-1][1]], told != trail[-1], str(error)


def _means(*nets):
    return [net[1].running_mean.tolist() for net in nets]


def test_each_of_two_adversaries_goes_back_to_its_own_last_step():
    (back, moved, message), _ = (rank.said or (0, 0, 0) for rank in outcomes(2, _adversaries))
    assert (back, moved) == (True, True), message
    assert message.startswith("the backward of Sequential.1 failed on rank 0 of 0, 1: rank 1 is")


def _groups(rank, world):
    """In one group the backend fails; the other is destroyed."""
    layer, x = BatchNorm1d(3, statistics=Sync.groups_of(2)), torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    fails = RuntimeError("CUDA error: unhandled\nand its long explanation")
    if rank == 1:
        mock.patch.object(dist, "all_to_all_single", side_effect=fails).start()
    if rank > 1:
        dist.destroy_process_group(layer.statistics.process_group)
    with pytest.raises(SyncError) as raised:
        layer(x)
    return str(raised.value), int(layer.num_batches_tracked)


def test_errors_of_the_backend_and_of_use_are_told_as_such():
    ranks = outcomes(4, _groups, limit=30)
    told = (
        r" on rank 0 of 0, 1: on rank 1, CUDA error: unhandled\. The running statistics",
        r" on rank 1 of 0, 1: CUDA error: unhandled\. The running statistics",
        ": its process group has been destroyed",
        ": its process group has been destroyed",
    )
    for rank, words in zip(ranks, told, strict=True):
        assert rank.said is not None, rank.trace
        message, count = rank.said
        assert re.match(f"the forward of BatchNorm1d failed{words}", message)
        assert count == 1

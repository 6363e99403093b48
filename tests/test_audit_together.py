"""`audit` on several ranks: together, alone, and with a rank that does not come."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm1d, Ghost, Sync
from batchnorm.audit import NoBatchesError, Severity, audit, label_loss
from processes import run_ranks


def network(norm=nn.BatchNorm1d) -> nn.Sequential:
    """In float64, trained on normal data: the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), norm(8), nn.Tanh(), nn.Linear(8, 3, bias=False), norm(3)
    ).double()
    plain = network() if norm is not nn.BatchNorm1d else model
    if norm is nn.BatchNorm1d:
        for x, _ in batches(9, 40):
            model(x)
    model.load_state_dict(plain.state_dict())
    return model


def synchronized(channels: int, **options) -> BatchNorm1d:
    return BatchNorm1d(channels, statistics=Sync(**options))


def batches(seed: int, number: int = 8, n: int = 12, shift: float = 0.0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 4, generator=generator, dtype=torch.float64) + shift,
            torch.randint(3, (n,), generator=generator),
        )
        for _ in range(number)
    ]


def state(model: nn.Module) -> dict:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {f"mode of {path}": module.training for path, module in model.named_modules()}
    return {**values, **modes, "random": torch.get_rng_state()}


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, name


def agreed(model: nn.Module, data: list | None = None, **options):
    """The report of all ranks, which is the same on each, of a model that is left as it was."""
    before = state(model)
    report = audit(model, data, group=dist.group.WORLD, **options)
    assert_same_state(before, state(model))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, repr(report))
    assert everyone == [repr(report)] * len(everyone)
    assert report.disabled == {}
    return report


def found(report) -> dict:
    return {finding.code: finding for finding in report.findings}


def _own_batches(rank, world):
    """Each rank its own, of any number; what one of them finds is told with its number."""
    aside = rank == 2
    for model in (network(), DistributedDataParallel(network())):
        data = batches(rank, 8 - rank, shift=5.0 * aside)
        report = agreed(model, data, loss=label_loss)
        assert (report.ranks, report.calls, report.layers) == (world, 8, 2)
        stale = [f for f in report.findings if f.code == "BN103"]
        assert {finding.ranks for finding in stale} == {(2,)}
        first = model.module[1] if isinstance(model, DistributedDataParallel) else model[1]
        assert first.running_mean is not None
        assert report.profiles
        assert report.subject == type(model).__name__
    assert agreed(network()).calls == 0


def _synchronized_layers(rank, world):
    """As one process with the batches of all ranks: to rounding, and not by a rank's own few."""
    mine = batches(rank, 12 - rank, n=2 + 2 * rank)
    whole = [
        tuple(torch.cat(parts) for parts in zip(*step, strict=True))
        for step in zip(*(batches(r, 12 - r, n=2 + 2 * r) for r in range(world)), strict=False)
    ]
    expected = audit(network(), whole)
    for model in (network(synchronized), DistributedDataParallel(network(synchronized))):
        report = agreed(model, mine)
        assert report.calls == len(whole) == 12 - (world - 1)
        for ours, theirs in zip(report.profiles, expected.profiles, strict=True):
            assert ours.noise.value == pytest.approx(theirs.noise.value, rel=1e-9)
            assert ours.distance.shift == pytest.approx(theirs.distance.shift, rel=1e-9)
            assert ours.distance.stretch == pytest.approx(theirs.distance.stretch, rel=1e-9)
        assert "BN110" not in found(report)
    # layers that normalize two samples each are noisy
    assert found(agreed(network(), mine))["BN110"].severity is Severity.WARNING
    # and so are slices of a rank's batch, whatever the running statistics take up
    slices = network(lambda c: synchronized(c, slices=Ghost(2)))
    assert "BN110" in found(agreed(slices, mine))
    agreed(network(synchronized), mine, loss=label_loss, deploy=batches(rank))


def _what_they_hold(rank, world):
    model = network()
    with torch.no_grad():
        model[4].running_mean += rank * 0.3 * model[4].running_var.sqrt()
    finding = found(agreed(model))["BN112"]
    assert finding.modules == ("4",)
    assert finding.numbers["shift"] == pytest.approx(0.3 * (world - 1), rel=1e-3)
    assert (finding.numbers["rank"], finding.numbers["other_rank"]) == (0, world - 1)
    assert "BN112" not in found(agreed(DistributedDataParallel(model)))  # made them rank 0's
    with torch.no_grad():
        model[4].running_mean += rank
    wrapped = DistributedDataParallel(network())
    with torch.no_grad():
        wrapped.module[4].running_mean += rank
    assert "BN112" not in found(agreed(wrapped))  # which are rank 0's at the next pass
    wrapped.broadcast_buffers = False
    assert "BN112" in found(agreed(wrapped))


def _what_they_would_wait_in(rank, world):
    """Nobody waits, and no batch is run."""
    for norm, told in ((synchronized, True), (nn.BatchNorm1d, False)):
        model = network(norm)
        if rank == 1:
            model[4].eval()
        report = agreed(model, batches(rank))
        assert ("BN114" in found(report)) is told
        assert report.calls == (0 if told else 8)
    assert found(report).keys() <= {"BN103", "BN110", "BN127"}

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(synchronized), network(synchronized)

        def forward(self, x):
            return self.first(x) + (self.second(x) if rank else 0)

    finding = found(report := agreed(Branches(), batches(rank)))["BN114"]
    assert report.calls == 0
    assert finding.modules == ("second.1",)
    words = "was called once in training mode on ranks 1 and 2, 0 times on rank 0 in one pass"
    assert finding.message == f"second.1 {words}"
    # evaluated as a whole by one rank, and trained by the others
    model = network(synchronized).train(rank != 0)
    assert agreed(model, batches(rank)).calls == 8


def _alone(rank, world):
    """A rank that looks by itself waits for nobody, or is told that it would."""
    if rank:
        return
    assert audit(network(), batches(0), loss=label_loss).ranks == 1
    model = network(synchronized)
    words = "'1' and 1 more would wait for ranks 0–2, with which it normalizes in training mode"
    with pytest.raises(ValueError, match=words):
        audit(model, batches(0))
    assert audit(model).layers == 2
    model[1].freeze()
    with pytest.raises(ValueError, match="'4' would wait for ranks 0–2"):
        audit(model, batches(0))
    model[4].eval()  # in a model that trains it is meant
    assert audit(model, batches(0)).calls == 8
    with pytest.raises(ValueError, match="would wait"):
        audit(network(lambda c: BatchNorm1d(c, statistics=Sync(neighbours=3))), batches(0))


def _alone_in_a_wrapper(rank, world):
    """Of which every forward pass would send rank 0's buffers to all."""
    model = DistributedDataParallel(network())
    if rank == 0:
        assert audit(model, batches(0), loss=label_loss).calls == 8
    assert model.broadcast_buffers
    dist.barrier()
    model(batches(rank)[0][0]).sum().backward()


def _one_does_not_come(rank, world):
    started = time.monotonic()
    model = network(synchronized)
    if rank == 1:
        time.sleep(4)
        with pytest.raises(TimeoutError, match="rank 1 of 3 came after 1 seconds"):
            audit(model, batches(rank), group=dist.group.WORLD, wait=1.0)
    else:
        with pytest.raises(TimeoutError, match="rank 1 of 3 did not come within 1 seconds"):
            audit(model, batches(rank), group=dist.group.WORLD, wait=1.0)
    assert time.monotonic() - started < 30
    assert agreed(model, batches(rank)).calls == 8  # the next is another meeting


def _one_fails(rank, world):
    class Fails(nn.Module):
        def __init__(self, at: int):
            super().__init__()
            self.inner, self.left = network(), at

        def forward(self, x):
            self.left -= 1
            if self.left == 0:
                raise LookupError("on purpose")
            return self.inner(x)

    before = state(network())
    for failing in range(world):
        is_mine = rank == failing
        error, said = (NoBatchesError, "no batches") if is_mine else (RuntimeError, "NoBatchesErr")
        with pytest.raises(error, match=said):
            audit(network(), [] if is_mine else batches(rank), group=dist.group.WORLD)
        error, said = (LookupError, "on purpose") if is_mine else (RuntimeError, "LookupError: on")
        with pytest.raises(error, match=said):
            audit(Fails(5 if is_mine else 0), batches(rank), group=dist.group.WORLD)
    with pytest.raises(ValueError, match="batches on all ranks of the group, or on none"):
        audit(network(), batches(rank) if rank else None, group=dist.group.WORLD)
    assert_same_state(before, state(network()))


def _some_of_them(rank, world):
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="not in the group"):
            audit(network(), batches(rank), group=group)
        return
    model = network()
    model[4].running_mean += rank
    report = audit(model, batches(rank), group=group)
    assert report.ranks == 2
    assert found(report)["BN112"].numbers["other_rank"] == 2  # by its number among all
    own = network(lambda c: synchronized(c, group=group))
    assert audit(own, batches(rank), group=group).calls == 8
    words = "'1' normalizes with ranks 0–2 in training mode, and the group has ranks 0 and 2 alone"
    with pytest.raises(ValueError, match=words):
        audit(network(synchronized), batches(rank), group=group)


def _ranks(rank, world):
    for check in (
        _own_batches,
        _synchronized_layers,
        _what_they_hold,
        _what_they_would_wait_in,
        _alone,
        _alone_in_a_wrapper,
        _one_does_not_come,
        _one_fails,
        _some_of_them,
    ):
        check(rank, world)
        dist.barrier()


def test_three_ranks():
    run_ranks(3, _ranks)


def test_a_group_of_nobody_else_is_no_group():
    report = audit(network(synchronized), batches(0), group=None)
    assert (report.ranks, report.calls) == (1, 8)
    assert copy.deepcopy(report) == report

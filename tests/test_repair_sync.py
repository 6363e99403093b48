"""Repairs of models whose layers share statistics with other ranks, with real processes."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import (
    Batch,
    BatchNorm2d,
    DomainBatchNorm,
    Ghost,
    LazyBatchNorm2d,
    Running,
    Sync,
    SyncError,
    Untracked,
    accumulate,
    adapt,
    convert,
    domain,
    freeze,
    frozen_statistics,
    pooled_forward,
    recalibrate,
    reduce_statistics,
    unfreeze,
)
from batchnorm.kernels import Sums
from batchnorm.models.norms import sync_of
from batchnorm.ranks import Caller, Peers
from batchnorm.repair.pooling import operation
from collectives import counted_collectives
from processes import run_ranks
from recalibrated import UPSTREAMS, images, plain, values
from test_repair_pooling import Residual

RANKS = 3
EXACT = {"rtol": 0, "atol": 1e-12}


def _layer(**options):
    layer = BatchNorm2d(3, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 3))
    return layer


def _parts(*sizes, seed=0):
    """Batches whose means lie apart, (n, 3, 6, 6)."""
    torch.manual_seed(seed)
    return [part.double() for part in images(*sizes)]


def _equal(mine, wanted):
    torch.testing.assert_close(mine, wanted, **EXACT)


def _equal_buffers(mine, wanted):
    _equal(dict(mine.named_buffers()), dict(wanted.named_buffers()))


def _everyone(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _ranks_accumulate(rank):
    """Micro-batches of all ranks, as one; with no exchange beside the forward passes' own."""
    parts = _parts(2, 3, 1, 4, 0, 2)
    layer, whole = _layer(statistics=Sync()), _layer()
    model = nn.Sequential(layer)
    with accumulate(model, 2) as accumulation, counted_collectives() as sent:
        for part in parts[2 * rank : 2 * rank + 2]:
            model(part)
        assert accumulation.updates == 1
    assert len(sent) == 2
    whole(torch.cat(parts))
    _equal_buffers(layer, whole)


class _Fused(Residual):
    """The block with an activation fused, whatever its norm is."""

    def __init__(self, norm, channels):
        super().__init__(norm, channels)
        self.fused = norm(channels, act="relu")


def _network(norm):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), _Fused(norm, 4), norm(4, affine=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip


def _native(channels, act=None, **options):
    """As torch's, whose own forward pass refuses the CPU and is not called."""
    if act is not None:
        return BatchNorm2d(channels, statistics=Sync(), act=act, **options)
    return nn.SyncBatchNorm(channels, **options)


def _ranks_pool_forward(rank):
    """As one process with the micro-batches of all ranks; each rank has another number of them."""
    sizes = [(2, 3), (4,), (1, 0, 2)]
    parts = _parts(*(n for mine in sizes for n in mine))
    first = sum(map(len, sizes[:rank]))
    mine = [part.clone().requires_grad_() for part in parts[first : first + len(sizes[rank])]]
    whole, x = _network(BatchNorm2d), torch.cat(parts).requires_grad_()
    y = whole(x)
    y.square().sum().backward()
    outputs, gradients = (
        t.split([len(part) for part in parts])[first : first + len(mine)] for t in (y, x.grad)
    )
    for norm in (lambda c, **told: BatchNorm2d(c, statistics=Sync(), **told), _native):
        model = _network(norm)
        with counted_collectives() as sent:
            got = pooled_forward(model, mine)
            sum(each.square().sum() for each in got).backward()
        assert len(sent) == 2 * 5
        _equal(tuple(got), outputs)
        _equal(tuple(part.grad for part in mine), gradients)
        for name, parameter in model.named_parameters():
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(
                parameter.grad, whole.get_parameter(name).grad, rtol=1e-10, atol=1e-10
            )
        _equal_buffers(model, whole)
        for part in mine:
            part.grad = None
    layer, alone = _layer(statistics=Untracked(Sync())), _layer()
    before = values(layer)
    y = torch.cat(pooled_forward(layer, mine))
    _equal(y, torch.cat(alone(torch.cat(parts)).split(list(map(len, parts)))[first:][: len(mine)]))
    assert values(layer) == before
    one = torch.ones(int(rank == 1), 3, 1, 1).double()
    with pytest.raises(ValueError, match="at the model in all micro-batches together"):
        pooled_forward(_layer(statistics=Sync()), [one])
    sums = Sums(torch.ones(4).double(), torch.ones(4).double())
    total = operation._total(sums, Peers(None, Caller("a.norm", 2**20 - 1)))
    _equal(tuple(total), (sums.total * 3, sums.total * 3))
    layer = _layer(statistics=Sync())
    before = values(layer)
    pooled_forward(layer, mine)
    assert values(layer) != before
    with pytest.raises(SyncError, match=f"different orders, at layer{rank} this one"):
        operation._total(sums, Peers(None, Caller(f"layer{rank}", 1 + rank)))
    assert values(layer) == before


def _ranks_convert(rank):
    """A SyncBatchNorm stays synchronized over its ranks, and comes back."""
    group, alone = dist.new_group([0, 2]), dist.new_group([1])
    group = alone if rank == 1 else group
    parts = _parts(3, 5, 2)
    native = nn.SyncBatchNorm(3, process_group=group).double()
    model = nn.Sequential(native)
    twin = nn.Sequential(nn.SyncBatchNorm(3).double())
    result = convert(model, to="batchnorm", example=parts[0])
    assert (type(native), native.statistics) == (BatchNorm2d, Sync(group))
    assert "statistics=Sync(group=<ranks" in result.converted["0"][1]
    DistributedDataParallel(model)  # which refuses the other on the CPU
    whole = nn.BatchNorm2d(3).double()
    y = whole(parts[1] if rank == 1 else torch.cat((parts[0], parts[2])))
    _equal(model(parts[rank]), y if rank == 1 else y.split((3, 2))[rank // 2])
    _equal_buffers(native, whole)
    again = copy.deepcopy(model)
    assert again[0].statistics.group is group
    twin.load_state_dict(model.state_dict())
    for each in (model, again):
        convert(each, to="original")
        assert (type(each[0]), each[0].process_group) == (nn.SyncBatchNorm, group)
    convert(model, to="sync", example=parts[0])
    assert native.statistics == Sync(group)
    convert(model, to="torch_sync")
    assert (type(native), native.process_group) == (nn.SyncBatchNorm, group)
    convert(model, to="sync", process_group=alone if rank == 1 else None, example=parts[0])
    assert native.statistics == Sync(group)
    neighbours = nn.Sequential(BatchNorm2d(3, statistics=Sync.groups_of(1)))
    assert convert(neighbours, to="torch_sync").lost == {}
    assert dist.get_process_group_ranks(neighbours[0].process_group) == [rank]


def _ranks_freeze(rank):
    parts = _parts(3, 5, 2)
    model, whole = nn.Sequential(_layer(statistics=Sync())), _layer()
    before = values(model)
    wanted = whole(torch.cat(parts)).split((3, 5, 2))[rank]
    freeze(model, statistics="batch")
    _equal(model(parts[rank]), wanted)
    with frozen_statistics(unfrozen := nn.Sequential(_layer(statistics=Sync()))):
        _equal(unfrozen(parts[rank]), wanted)
    assert values(model) == values(unfrozen) == before
    with counted_collectives() as sent:
        freeze(model)
        model(parts[rank])
        again = pickle.loads(pickle.dumps(model))  # noqa: S301
        assert sent == []
    for each in (model, again):
        unfreeze(each)
        assert each[0].statistics == Sync()
        _equal(each(parts[rank]), wanted)
        _equal_buffers(each[0], whole)


def _ranks_run_in_eval_mode(rank, batches, wanted):
    """Any number of batches on each rank: nobody waits for the others' layers."""
    mine = [batches[:3], [], batches[3:]][rank]
    for upstream, want in wanted.items():
        model = plain(lambda c: BatchNorm2d(c, statistics=Sync())).train()
        model.load_state_dict(want["before"])
        with counted_collectives() as sent:
            result = recalibrate(model, iter(mine), upstream=upstream)
        assert {name for name, _ in sent} == {"all_gather_object"}
        assert (result.batches, result.frozen) == (5, ())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, want["after"][name], rtol=1e-5, atol=1e-6)
        assert _everyone(values(model)) == [values(model)] * RANKS
        numbers = values(model)
        assert reduce_statistics(model).untracked == ("norm3", "norm1", "norm2")
        assert values(model) == numbers
    numbers = values(model)
    with counted_collectives() as sent, adapt(model.eval()) as adaptation:
        for batch in mine:
            model(batch)
        assert len(adaptation.layers) == 3
    assert sent == []
    assert values(model) == numbers


def _ranks_meet_in_a_domain(rank):
    """The last of all: after an error the group is not to be used again."""
    parts = _parts(3, 5, 2)
    norm, whole = DomainBatchNorm(_layer(statistics=Sync()), ["a", "b"]), _layer()
    before = values(norm)
    wanted = whole(torch.cat(parts)).split((3, 5, 2))[rank]
    for each in (norm, copy.deepcopy(norm)):
        with domain("b"):
            y = each(parts[rank])
        _equal(y, wanted)
        _equal_buffers(each.layers["b"], whole)
        y.sum().backward()
    numbers = values(norm)
    assert numbers != before
    with pytest.raises(SyncError, match=r"DomainBatchNorm\.layers\."), domain("ab"[rank == 1]):
        norm(parts[rank])
    assert values(norm) == numbers


def _ranks(rank, world, batches, wanted):
    _ranks_accumulate(rank)
    _ranks_pool_forward(rank)
    _ranks_convert(rank)
    _ranks_freeze(rank)
    _ranks_run_in_eval_mode(rank, batches, wanted)
    _ranks_meet_in_a_domain(rank)


def test_repairs_know_layers_that_share_statistics():
    batches, wanted = images(4, 3, 5, 2, 1), {}
    for upstream in UPSTREAMS:
        model = plain(BatchNorm2d)
        before = copy.deepcopy(model.state_dict())
        recalibrate(model, batches, upstream=upstream)
        wanted[upstream] = {"before": before, "after": model.state_dict()}
    run_ranks(RANKS, _ranks, batches, wanted)


def test_alone_they_are_layers_of_their_own_batch():
    parts = _parts(2, 3)
    layer, whole = _layer(statistics=Sync()), _layer()
    _equal(torch.cat(pooled_forward(layer, parts)), whole(torch.cat(parts)))
    _equal_buffers(layer, whole)
    with pytest.raises(TypeError, match=r"statistics=Sync\(slices=Ghost\(size=2\)\); pooled_for"):
        pooled_forward(_layer(statistics=Sync(slices=Ghost(2))), parts)
    whole(torch.cat(parts))
    with accumulate(layer, 2):
        for part in parts:
            layer(part)
    _equal_buffers(layer, whole)


@pytest.mark.parametrize(
    ("layer", "sync"),
    [
        (BatchNorm2d(3), None),
        (nn.BatchNorm2d(3), None),
        (BatchNorm2d(3, statistics=Sync(slices=Ghost(2))), Sync(slices=Ghost(2))),
        (BatchNorm2d(3, statistics=Untracked(Sync())), Sync()),
        (nn.SyncBatchNorm(3), Sync()),
        (nn.SyncBatchNorm(3, process_group=object()), None),  # of other ranks
        (nn.Linear(1, 1), None),
    ],
)
def test_who_shares_statistics_is_seen(layer, sync):
    assert sync_of(layer) == sync


def test_sync_is_one_more_policy_to_convert_to():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        BatchNorm2d(3, act="relu", statistics=Ghost(2)),
        BatchNorm2d(3, statistics=Untracked(Batch())),
        BatchNorm2d(3, statistics=Sync(slices=Ghost(2))),
        LazyBatchNorm2d(),
        BatchNorm2d(3, statistics=Running()),
        BatchNorm2d(3).freeze(),
        DomainBatchNorm(BatchNorm2d(3), ["a"]),
    )
    state = model.state_dict()
    result = convert(model, to="sync")
    policies = [layer.statistics for layer in model[:5]]
    sync = Sync()
    assert policies == [sync, sync, Untracked(sync), Sync(slices=Ghost(2)), sync]
    assert str(model[1].act) == "relu"
    assert model[7].layers["a"].statistics == sync
    assert "set Batch()" in result.skipped["5"]
    assert "unfreeze() it before Sync()" in result.skipped["6"]
    assert list(model.state_dict()) == list(state)
    lost = convert(model, to="torch_sync").lost
    assert lost["3"] == "statistics=Sync(slices=Ghost(size=2))"
    assert [type(model[i]).__name__ for i in (0, 1, 3)] == [
        "SyncBatchNorm",
        "BatchNorm2d",
        "SyncBatchNorm",
    ]
    alone = nn.Sequential(BatchNorm2d(3, statistics=Sync.groups_of(8)))
    assert convert(alone, to="torch_sync").lost == {"0": "statistics=Sync(neighbours=8)"}
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    assert convert(model, to="sync", fuse=True).fused == {"0": "relu"}
    model = nn.Sequential(BatchNorm2d(3, statistics=Sync()))
    assert convert(model, to="torch").lost == {"0": "statistics=Sync()"}


@pytest.mark.as_installed
def test_what_is_no_process_group_is_refused():
    for options in ({}, {"where": "0"}):
        with pytest.raises(TypeError, match="needs a process group"):
            convert(nn.Sequential(BatchNorm2d(3)), to="sync", process_group=3, **options)


def test_what_an_audit_advises_for_torchs_layer_trains_and_fits_its_state():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    batch, twin = _parts(4)[0].float(), copy.deepcopy(model)
    convert(model, to="batchnorm", example=batch)
    assert model[1].statistics == Sync()
    torch.testing.assert_close(model(batch), twin(batch))
    twin.load_state_dict(model.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert again[1].statistics == Sync()
        _equal_buffers(again, model)
        convert(again, to="original")
        assert type(again[1]) is nn.SyncBatchNorm
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))

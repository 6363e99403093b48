"""Statistics over ranks: real processes, against one process with the concatenated batch."""

import copy
import io
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    Batch,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Ghost,
    Sync,
    SyncError,
    Untracked,
    freeze,
    rematerialize,
)
from batchnorm.functional import synchronized_batch_norm
from batchnorm.ranks import GraphPeers, Peers, peers
from collectives import counted_collectives
from processes import run_ranks

EXACT = {"rtol": 0, "atol": 1e-12}
SPLITS = [(2, 3, 1), (0, 4, 2), (6, 0, 0), (1, 1, 1), (1, 0, 5)]
LAYERS = [
    (BatchNorm2d, (4, 5), {}),
    (BatchNorm2d, (4, 5), {"act": "relu", "residual": True, "mask": True}),
    (BatchNorm2d, (4, 5), {"act": "silu", "residual": True, "channels_last": True}),
    (BatchNorm1d, (), {"act": "gelu"}),
    (BatchNorm1d, (7,), {"mask": True, "affine": False}),
    (BatchNorm3d, (2, 3, 2), {"residual": True, "momentum": None}),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_of(kind, channels, statistics, **options):
    layer = kind(channels, statistics=statistics, **options).double()
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 2, channels))
            layer.bias.copy_(torch.linspace(1, -1, channels))
    return layer


def part_of(sizes, rank):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def summed(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def equal(mine, wanted, **tolerance):
    torch.testing.assert_close(mine, wanted, **(tolerance or EXACT))


def passes(layer, x, dy, residual, mask):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = layer(x, residual=residual, mask=mask)
    y.backward(dy)
    return y.detach(), x.grad, None if residual is None else residual.grad


def _any_split_is_one_process(rank, world):
    for kind, positions, options in LAYERS:
        asked = dict(options)
        with_residual, with_mask = asked.pop("residual", False), asked.pop("mask", False)
        channels_last = asked.pop("channels_last", False)
        for statistics, alone in ((Sync(), Batch()), (Untracked(Sync()), Untracked(Batch()))):
            for sizes in SPLITS:
                shape, random = (sum(sizes), 3, *positions), seeded(len(sizes))
                x = torch.randn(shape, dtype=torch.float64, generator=random) * 2 + 3
                dy, skip = (
                    torch.randn(shape, dtype=torch.float64, generator=random) for _ in range(2)
                )
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                skip = skip if with_residual else None
                mask = torch.rand(shape[0], *positions, generator=random) > 0.3
                mask = mask if with_mask else None
                one = layer_of(kind, 3, alone, **asked)
                ours = layer_of(kind, 3, statistics, **asked)
                wanted = passes(one, x, dy, skip, mask)
                mine = part_of(sizes, rank)
                got = passes(ours, *(None if t is None else t[mine] for t in (x, dy, skip, mask)))
                for whole, part in zip(wanted, got, strict=True):
                    assert (whole is None) == (part is None)
                    if whole is not None:
                        equal(part, whole[mine])
                if one.affine:
                    equal(summed(ours.weight.grad), one.weight.grad)
                    equal(summed(ours.bias.grad), one.bias.grad)
                for name, buffer in one.named_buffers():
                    equal(ours.get_buffer(name), buffer)
                    everyone = [torch.empty_like(buffer) for _ in range(world)]
                    dist.all_gather(everyone, ours.get_buffer(name))
                    assert all(torch.equal(each, everyone[0]) for each in everyone)


def _odd_inputs(rank, world):
    # one far from zero, with little spread, in single precision
    x = 3000 + 0.3 * torch.randn(30, 4, 6, generator=seeded())
    sizes = (13, 2, 15)
    one, ours = BatchNorm1d(4), BatchNorm1d(4, statistics=Sync())
    equal(ours(x[part_of(sizes, rank)]), one(x)[part_of(sizes, rank)], rtol=0, atol=2e-6)
    # permuted inputs, and gradients of another layout than theirs
    x = torch.randn(5, 6, 9, 3, generator=seeded(), dtype=torch.float64).movedim(-1, 1)
    dy = torch.randn(9, 6, 3, 5, generator=seeded(1), dtype=torch.float64).permute(3, 2, 1, 0)
    sizes = (1, 3, 1)
    mine = part_of(sizes, rank)
    wanted = passes(layer_of(BatchNorm2d, 3, Batch()), x, dy, None, None)
    got = passes(layer_of(BatchNorm2d, 3, Sync()), x[mine], dy[mine], None, None)
    equal(got[0], wanted[0][mine])
    equal(got[1], wanted[1][mine])
    # half precision, and autocast
    x = torch.randn(6, 3, 4, 4, generator=seeded())
    mine = part_of((1, 2, 3), rank)
    for dtype in (torch.bfloat16, torch.float16):
        one, ours = BatchNorm2d(3), BatchNorm2d(3, statistics=Sync())
        equal(ours(x[mine].to(dtype)), one(x.to(dtype))[mine])
        assert ours(x[mine].to(dtype)).dtype == dtype
    conv = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.eye_(conv.weight[:, :, 0, 0].data)
    with torch.autocast("cpu", torch.bfloat16):
        got = nn.Sequential(conv, BatchNorm2d(3, statistics=Sync()))(x[mine])
        wanted = nn.Sequential(conv, BatchNorm2d(3))(x)[mine]
    equal(got, wanted)


def _a_batch_that_poisons_or_is_not_there(rank, world):
    layer = BatchNorm1d(3, statistics=Sync())
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3)
    if rank == 1:
        x[0, 1] = torch.nan
    layer(x)  # what one rank has, all would take up: nobody does
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value)
    layer(torch.randn(0, 3))  # counted, as torch.nn does, and nothing moved
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_var, torch.ones(3))
    # one value on one rank is enough where others have some
    sizes = (1, 0, 2)
    layer(torch.randn(sizes[rank], 3))
    assert layer.num_batches_tracked == 2
    with pytest.raises(
        ValueError, match=r"more than 1 value .* and one value on all ranks together"
    ):
        layer(torch.randn(1 if rank == 0 else 0, 3))
    assert layer.num_batches_tracked == 2


def _second_derivatives(rank, world):
    sizes = (2, 0, 3)
    mine = part_of(sizes, rank)
    for act, with_mask in ((None, False), ("tanh", True)):
        whole = torch.randn(5, 3, 4, dtype=torch.float64, generator=seeded())
        mask = torch.rand(5, 4, generator=seeded(1)) > 0.2 if with_mask else None

        def penalty(layer, x, mask):
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(layer(x, mask=mask).pow(3).sum(), x, create_graph=True)
            slope.pow(2).sum().backward()
            return x.grad, layer.weight.grad

        one, ours = (layer_of(BatchNorm1d, 3, s, act=act) for s in (Batch(), Sync()))
        dx, dw = penalty(one, whole, mask)
        dx_mine, dw_mine = penalty(ours, whole[mine], None if mask is None else mask[mine])
        equal(dx_mine, dx[mine], rtol=1e-9, atol=1e-9)
        equal(summed(dw_mine), dw, rtol=1e-9, atol=1e-9)


def _three_ranks(rank, world):
    torch.use_deterministic_algorithms(True)
    _any_split_is_one_process(rank, world)
    _odd_inputs(rank, world)
    _a_batch_that_poisons_or_is_not_there(rank, world)
    _second_derivatives(rank, world)


def test_any_split_over_ranks_is_one_process():
    run_ranks(3, _three_ranks)


def _collectives(rank, world):
    """One forward, of 2c + 1 numbers, one backward, of 2c; none where nobody has to be asked."""
    x = torch.randn(4, 5, 3, requires_grad=True)
    layer = BatchNorm1d(5, statistics=Sync(), act="relu")
    with counted_collectives() as sent:
        y = layer(x, residual=torch.ones(4, 5, 3))
        assert sent == [("all_to_all_single", 11 * 8)]
        y.sum().backward()
        assert sent == [("all_to_all_single", 11 * 8), ("all_to_all_single", 10 * 8)]
    alone = [dist.new_group([r]) for r in range(world)][rank]
    sliced = BatchNorm1d(5, statistics=Sync(slices=Ghost(2)))
    with counted_collectives() as sent:
        sliced(x).sum().backward()  # nobody waits for the gradients
    assert sent == [("all_to_all_single", 11 * 8)]
    for quiet in (
        copy.deepcopy(layer).eval(),
        copy.deepcopy(layer).freeze(),
        BatchNorm1d(5, statistics=Sync(alone)),
        BatchNorm1d(5, statistics=Sync.groups_of(1)),
    ):
        with counted_collectives() as sent:
            quiet(x).sum().backward()
        assert sent == []


def _functions(rank, world):
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded(rank), requires_grad=True)
    y, batch = synchronized_batch_norm(x, peers=Peers(None))
    assert batch.count.tolist() == [8] * 3
    equal(summed(y.detach().sum(0)), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="eps must be positive"):
        synchronized_batch_norm(x, peers=Peers(None), eps=0)
    with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func"):
        torch.func.grad(lambda x: synchronized_batch_norm(x, peers=Peers(None))[0].sum())(x)
    # what a compiled graph does, called by hand: the same bits
    graph = GraphPeers(dist.group.WORLD.group_name, world, rank)
    z, merged = synchronized_batch_norm(x, peers=graph)
    assert torch.equal(y, z)
    assert torch.equal(batch.mean, merged.mean)
    assert torch.equal(*(torch.autograd.grad(out.pow(3).sum(), x)[0] for out in (y, z)))


class Net(nn.Module):
    def __init__(self, statistics, recompute=None):
        super().__init__()
        norm = partial(BatchNorm2d, statistics=statistics, act="relu")
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm(4))
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm(6))
        self.head = nn.Linear(6, 3)
        self.recompute = recompute

    def forward(self, x):
        x = self.stem(x)
        if self.recompute is None:
            x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.recompute)
        return self.head(x.mean((2, 3)))


def net(statistics, **options):
    torch.manual_seed(3)
    return Net(statistics, **options).double()


def trained(model, batches, steps=3):
    """SGD on the mean over the whole batch; `batches` are this rank's parts of equal size."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches[:steps]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def data(steps=3, n=8):
    random = seeded(5)
    return [
        (
            torch.randn(n, 1, 7, 7, dtype=torch.float64, generator=random),
            torch.randint(3, (n,), generator=random),
        )
        for _ in range(steps)
    ]


def _training_is_one_process_s(rank, world):
    one = net(Batch())
    trained(one, data())
    half = slice(4 * rank, 4 * rank + 4)
    parts = [(x[half], target[half]) for x, target in data()]
    for options, wrap in (
        ({}, DistributedDataParallel),
        ({}, partial(DistributedDataParallel, broadcast_buffers=False)),
        ({"recompute": False}, DistributedDataParallel),
        ({"recompute": True}, DistributedDataParallel),
        ({}, rematerialized),
        ({}, fully_shard),
    ):
        model = net(Sync(), **options)
        trained(wrap(model), parts)
        state = model.state_dict()
        for name, value in one.state_dict().items():
            got = state[name]
            equal(got.full_tensor() if hasattr(got, "full_tensor") else got, value)


def rematerialized(model):
    rematerialize(model)
    return DistributedDataParallel(model)


def _slices_are_one_process_s(rank, world):
    """Ghost batch norm in one process, whose slices fall into ranks."""
    x = torch.randn(8, 3, 5, dtype=torch.float64, generator=seeded())
    dy = torch.randn(8, 3, 5, dtype=torch.float64, generator=seeded(1))
    one = layer_of(BatchNorm1d, 3, Ghost(2))
    ours = layer_of(BatchNorm1d, 3, Sync(slices=Ghost(2)))
    mine = part_of((4, 4), rank)
    wanted, got = passes(one, x, dy, None, None), passes(ours, x[mine], dy[mine], None, None)
    equal(got[0], wanted[0][mine])
    equal(got[1], wanted[1][mine])
    for name, buffer in one.named_buffers():
        equal(ours.get_buffer(name), buffer)


def _the_switches(rank, world):
    """Frozen, thawed, domains of their own: the policy behaves as others do."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded(rank))
    layer = layer_of(BatchNorm1d, 3, Sync())
    frozen = freeze(nn.Sequential(layer), statistics="batch")
    assert layer.statistics == Untracked(Sync())
    layer(x)
    assert layer.num_batches_tracked == 0
    frozen.undo()
    assert layer.statistics == Sync()
    with pytest.raises(TypeError, match="holds a process group, which exists in this process"):
        pickle.dumps(Sync(dist.group.WORLD))
    mine = Sync(dist.group.WORLD)
    assert copy.deepcopy(mine) is mine
    assert repr(mine) == "Sync(group=<ranks [0, 1]>)"
    assert Sync().size == mine.size == Sync.groups_of(5).size == world


class Forks(nn.Module):
    def __init__(self, channels, way):
        super().__init__()
        self.stem, self.first = (BatchNorm1d(3, statistics=Sync()) for _ in range(2))
        self.other, self.way = BatchNorm1d(channels, statistics=Sync()), way

    def forward(self, x):
        x = self.stem(x)
        return (
            self.first(x)
            if self.way == "first"
            else self.other(x[:, :1].expand(-1, self.other.num_features))
        )


def _who_is_elsewhere_is_told(rank, world):
    """Layers of the same and of another width: at once, on all ranks, and nothing has moved."""
    for channels in (3, 64):
        model = Forks(channels, "first" if rank == 0 else "other")
        here, there = ("first", "other") if rank == 0 else ("other", "first")
        told = (
            rf"^the forward of Forks\.{here} failed on rank {rank} of 0, 1: "
            rf"rank {1 - rank} was in the forward of Forks\.{there}\."
        )
        with pytest.raises(SyncError, match=told):
            model(torch.randn(2, 3))
        for norm in (model.stem, model.first, model.other):
            assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
            assert norm.num_batches_tracked == 0
        dist.barrier()


def nobody_looks():
    """A device would be waited for wherever Python asks what a tensor holds."""
    asking = ("__bool__", "__float__", "__int__", "__index__", "item", "nonzero", "tolist")
    looks = AssertionError("the device is waited for")
    return mock.patch.multiple(
        torch.Tensor, **{name: mock.Mock(side_effect=looks) for name in asking}
    )


def _as_on_a_gpu(rank, world):
    """All-gather and all-reduce, and no look at what they bring: layers mixed up become NaN."""
    with mock.patch.object(peers, "_is_direct", return_value=False):
        x = torch.randn(4, 5, 3, requires_grad=True)
        with counted_collectives() as sent, nobody_looks():
            BatchNorm1d(5, statistics=Sync())(x).sum().backward()
        gather = "all_gather_" + ("single" if hasattr(dist, "all_gather_single") else "into_tensor")
        assert sent == [(gather, 2 * 11 * 8), ("all_reduce", 10 * 8)]
        _training_is_one_process_s(rank, world)
        x = torch.randn(4, 3, dtype=torch.float64, generator=seeded(rank))
        graph = GraphPeers(dist.group.WORLD.group_name, world, rank)
        found = []
        for asked in (Peers(None), graph):
            mine = x.clone().requires_grad_()
            y, _ = synchronized_batch_norm(mine, peers=asked)
            found += [y, torch.autograd.grad(y.pow(3).sum(), mine)[0]]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
        model = Forks(3, "first" if rank == 0 else "other")
        assert model(torch.randn(2, 3)).isnan().all()
        assert model.stem.num_batches_tracked == 1
        assert model.first.num_batches_tracked == model.other.num_batches_tracked == 0


def _two_ranks(rank, world):
    _collectives(rank, world)
    _functions(rank, world)
    _training_is_one_process_s(rank, world)
    _slices_are_one_process_s(rank, world)
    _the_switches(rank, world)
    _as_on_a_gpu(rank, world)
    _who_is_elsewhere_is_told(rank, world)


def test_two_ranks_ask_each_other_and_train_as_one():
    run_ranks(2, _two_ranks)


def _groups(rank, world):
    with mock.patch.object(dist, "new_subgroups", side_effect=AssertionError):
        assert Sync(neighbours=2).size == 2  # one rank may ask alone
    policy = Sync.groups_of(2)
    assert policy.size == 2
    assert policy.process_group is Sync.groups_of(2).process_group
    neighbours = [0, 1] if rank < 2 else [2, 3]
    assert dist.get_process_group_ranks(policy.process_group) == neighbours
    loaded = pickle.loads(pickle.dumps(policy))  # noqa: S301 - our own
    assert loaded == policy
    x = torch.randn(8, 3, dtype=torch.float64, generator=seeded())
    pair = slice(0, 4) if rank < 2 else slice(4, 8)
    mine = slice(2 * rank, 2 * rank + 2)
    for statistics in (policy, Sync(policy.process_group)):
        wanted, got = layer_of(BatchNorm1d, 3, Batch()), layer_of(BatchNorm1d, 3, statistics)
        equal(got(x[mine]), wanted(x[pair])[2 * (rank % 2) : 2 * (rank % 2) + 2])
        equal(got.running_var, wanted.running_var)
    with pytest.raises(ValueError, match=r"groups_of\(3\) needs a number of ranks that 3 divides"):
        Sync.groups_of(3)
    assert Sync.groups_of(8).size == 4
    mine = BatchNorm1d(3, statistics=Sync(policy.process_group))
    with mock.patch.object(dist, "is_initialized", return_value=False):
        with pytest.raises(RuntimeError, match="a process group that has been destroyed"):
            mine(torch.randn(4, 3))
        mine.eval()(torch.randn(4, 3))


def test_neighbours_synchronize_among_themselves():
    run_ranks(4, _groups)


def _compiled(rank, world):
    torch._dynamo.config.cache_size_limit = 64
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    for statistics in (Sync(), Sync(slices=Ghost(2)), Sync.groups_of(2)):
        plain = net(statistics)
        x = data(1)[0][0][4 * rank : 4 * rank + 4]
        wanted = plain(x)
        wanted.pow(3).sum().backward()
        for backend in (look, "inductor") if statistics == Sync() else ("aot_eager",):
            compiled = net(statistics)
            got = torch.compile(compiled, fullgraph=True, backend=backend)(x)
            got.pow(3).sum().backward()
            equal(got, wanted)
            for mine, of_plain in zip(compiled.parameters(), plain.parameters(), strict=True):
                equal(mine.grad, of_plain.grad)
            for name, buffer in plain.named_buffers():
                equal(compiled.get_buffer(name), buffer)
        # a rank that is compiled and one that is not understand each other
        one = BatchNorm1d(3, statistics=statistics)
        x = torch.randn(4, 3, generator=seeded(rank))
        equal((torch.compile(one, backend="aot_eager") if rank else one)(x).sum(0),
              BatchNorm1d(3, statistics=statistics)(x).sum(0), rtol=0, atol=1e-6)  # fmt: skip
    assert all(graph.count("_c10d_functional") == 4 for graph in graphs)  # and their waits
    with torch.no_grad():
        evaluated = net(Sync()).eval()
        equal(torch.compile(evaluated, fullgraph=True)(data(1)[0][0]), evaluated(data(1)[0][0]))


@pytest.mark.as_installed
def test_compiled_layers_keep_their_graph_whole():
    run_ranks(2, _compiled)


@pytest.mark.as_installed
def test_alone_it_is_the_batch_s():
    x, dy = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    for statistics, alone in (
        (Sync(), Batch()),
        (Sync.groups_of(4), Batch()),
        (Sync(slices=Ghost(4)), Ghost(4)),
    ):
        assert statistics.size == 1
        one, ours = (layer_of(BatchNorm1d, 3, s) for s in (alone, statistics))
        for wanted, got in zip(
            passes(one, x, dy, None, None), passes(ours, x, dy, None, None), strict=True
        ):
            assert wanted is got is None or torch.equal(wanted, got)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ours(torch.randn(1, 3))
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=False).statistics == statistics
    shown = [Sync(), Sync.groups_of(8), Sync(slices=Ghost(2))]
    assert [repr(s) for s in shown] == [
        "Sync()",
        "Sync(neighbours=8)",
        "Sync(slices=Ghost(size=2))",
    ]


BAD = [
    (lambda: Sync("gloo"), TypeError, r"needs a process group, .* got 'gloo'"),
    (lambda: Sync(slices=8), TypeError, r"needs slices of a rank's batch, Ghost\(size\), got 8"),
    (lambda: Sync.groups_of(0), ValueError, "whole number of ranks from 1 on, got 0"),
    (lambda: Sync.groups_of(2.0), ValueError, "whole number of ranks from 1 on, got 2.0"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[b[2] for b in BAD])
@pytest.mark.as_installed
def test_bad_settings_are_answered(make, error, message):
    with pytest.raises(error, match=message):
        make()

from inspect import signature

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm1d, BatchNorm2d, Running, reduce_statistics
from batchnorm.repair.reduction import merging, reduction
from processes import run_ranks
from recalibrated import state, values

RANKS = 3
COUNTS = {"0": (5, 1, 2), "1": (7, 0, 3), "2": (0, 4, 0), "3": (6, 6, 6)}  # by layer, of each rank

# its name since torch 2.13, which warns of the other
FLAGS = signature(DistributedDataParallel).parameters
FLAG = "forward_sync_buffers" if "forward_sync_buffers" in FLAGS else "broadcast_buffers"
WITHOUT_BROADCAST = {FLAG: False}


def _model(rank=None, dtype=torch.float64):
    """Four layers of all makes; with a rank's own statistics, if one is given."""
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNorm2d(4), nn.SyncBatchNorm(2), BatchNorm1d(5))
    model = model.to(dtype)
    if rank is not None:
        numbers = np.random.default_rng(rank)
        for path, layer in model.named_children():
            c = layer.num_features
            layer.running_mean.copy_(torch.from_numpy(numbers.normal(100 * rank, 3, c)))
            layer.running_var.copy_(torch.from_numpy(numbers.gamma(2, 3, c)))
            layer.num_batches_tracked.fill_(COUNTS[path][rank])
    return model


def _merged(path, weights, dtype=torch.float64):
    """By the formula, in NumPy's float64."""
    layers = [_model(rank, dtype).get_submodule(path) for rank in range(RANKS)]
    means, variances = (
        np.stack([getattr(layer, name).double().numpy() for layer in layers])
        for name in ("running_mean", "running_var")
    )
    mean = np.average(means, 0, weights)
    return mean, np.average(variances + (means - mean) ** 2, 0, weights)


def _everyone(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _holds(model, weights=COUNTS, tolerance=1e-13):
    """Whether a model holds the merged statistics and the largest counters."""
    for path, layer in model.named_children():
        mean, var = _merged(path, weights[path], layer.running_mean.dtype)
        np.testing.assert_allclose(layer.running_mean.double(), mean, tolerance, tolerance)
        np.testing.assert_allclose(layer.running_var.double(), var, tolerance)
        assert layer.num_batches_tracked == max(COUNTS[path])


def _ranks_merge_by_count(rank):
    def apart(model):
        return DistributedDataParallel(model, **WITHOUT_BROADCAST)

    for wrap in (
        lambda model: model,
        apart,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(apart(model), backend="eager"),
        lambda model: apart(torch.compile(model, backend="eager")),
    ):
        model = _model()
        model[2] = nn.BatchNorm2d(2).double() if wrap is not nn.DataParallel else model[2]
        model.requires_grad_(True)
        wrapped = wrap(model)  # DistributedDataParallel gives all ranks the first one's numbers
        model.load_state_dict(_model(rank).state_dict())
        before, buffers = values(model), [id(b) for b in model.buffers()]
        result = reduce_statistics(wrapped)
        _holds(model)
        assert [id(b) for b in model.buffers()] == buffers
        assert _everyone(values(model)) == [values(model)] * RANKS
        assert {s.path: s.weights for s in result.layers} == COUNTS
        result.undo()
        assert values(model) == before
    single = _model(rank, torch.float32)
    reduce_statistics(single)
    _holds(single, tolerance=1e-7)  # rounded once
    model = _model(rank).train()
    numbers = values(model)
    result = reduce_statistics(model, where=["0", "3"])
    moved = {name for name, value in values(model).items() if value != numbers[name]}
    assert {name[0] for name in moved} == {"0", "3"}
    assert [s.path for s in result.layers] == ["0", "3"]
    assert model.training


def _ranks_weigh_by_samples(rank):
    samples = (600, 30, 1000)
    # no rank's samples are for a layer that it never called
    weights = {path: np.multiply(samples, np.array(c) > 0) for path, c in COUNTS.items()}
    model = _model(rank)
    result = reduce_statistics(model, samples=samples[rank])
    _holds(model, weights)
    assert {s.path: s.weights for s in result.layers} == {p: tuple(w) for p, w in weights.items()}
    model = _model(rank)
    reduce_statistics(model, samples=0 if rank == 0 else 8, where="3")
    mean, var = _merged("3", (0, 8, 8))
    np.testing.assert_allclose(model[3].running_mean, mean, 1e-13)
    np.testing.assert_allclose(model[3].running_var, var, 1e-13)


def _ranks_that_nobody_tracked(rank):
    model = _model()
    before = values(model)
    assert reduce_statistics(model).untracked == ("0", "1", "2", "3")
    assert values(model) == before
    model = _model(0)
    for path, layer in model.named_children():
        layer.num_batches_tracked.fill_(COUNTS[path][rank])
    before, result = values(model), reduce_statistics(model)
    after = values(model)
    assert {n: after[n] for n in after if "tracked" not in n} == {  # alike: to the bit
        n: before[n] for n in before if "tracked" not in n
    }
    assert {s.mean_most for s in result.layers} == {0.0}
    for layer in model:
        layer.num_batches_tracked.zero_()
    model[1].running_mean.fill_(rank)
    with pytest.raises(ValueError, match="'1' has other running statistics on other ranks, though"):
        reduce_statistics(model)
    reduce_statistics(model, samples=1)
    assert model[1].running_mean.tolist() == [1.0] * 4
    model[1].num_batches_tracked = None
    with pytest.raises(ValueError, match="'1' has no num_batches_tracked to be weighed by"):
        reduce_statistics(model)
    model[1].running_mean.fill_(rank)
    reduce_statistics(model, samples=[1, 0, 0][rank])
    assert model[1].running_mean.tolist() == [0.0] * 4


def _ranks_with_broken_statistics(rank):
    for breaks in (torch.nan, torch.inf, -1.0):
        model = _model(rank)
        if rank == 1:  # where it counts nothing
            model[1].running_mean.fill_(torch.nan)
            model[1].running_var.fill_(breaks)
        reduce_statistics(model)
        _holds(model)
        if rank == 2:
            model[3].running_var[2] = breaks
        numbers = values(model)
        with pytest.raises(ValueError, match="rank 2 of 3: the running statistics of '3' are no"):
            reduce_statistics(model)
        assert str(values(model)) == str(numbers)
        reduce_statistics(model, where=["[012]"])
        reduce_statistics(model, samples=int(rank != 2))
        assert model[3].running_var.isfinite().all()
    model = _model(rank, torch.float16)  # this library's layers keep theirs in float32
    model[0].running_mean.fill_([6e4, -6e4, 0][rank])
    with pytest.raises(ValueError, match=r"'0'.*exceed what torch.float16 buffers hold"):
        reduce_statistics(model)


def _ranks_that_fail_together(rank):
    def shorter(model):
        del model[3]

    def wider(model):
        model[0] = nn.BatchNorm2d(7)

    def another_dtype(model):
        model[0].float()

    def nothing(model):
        model.__class__ = type("Empty", (nn.Sequential,), {"named_modules": lambda *_, **__: []})

    first = "rank 1 of 3 failed with "
    for change, options, kind, message, told in (
        (shorter, {}, ValueError, r"ranks 0 and 1 differ in 3: build", None),
        (wider, {}, ValueError, "got 3 channels in .*float64 with a counter on rank 0 and 7", None),
        (another_dtype, {}, ValueError, "torch.float32 and torch.float32 with a counter", None),
        (None, {"samples": 3}, ValueError, "on all ranks or on none; ranks 0 and 1", None),
        (None, {"samples": -3}, ValueError, "at least 0, got -3", first + "ValueError"),
        (None, {"samples": 0.5}, TypeError, "whole number", first + "TypeError"),
        (None, {"where": "x.*"}, ValueError, "where='x.*' means none", first + "ValueError"),
        (nothing, {}, ValueError, "nothing to reduce", first + "ValueError"),
        (lambda m: m.to("meta"), {}, ValueError, "'0' is lazy or on the meta", first + "Value"),
    ):
        model = _model(rank)
        if change and rank == 1:
            change(model)
        before, numbers = state(model), str(model.state_dict())
        expected = (kind, message) if rank == 1 or told is None else (RuntimeError, told)
        with pytest.raises(expected[0], match=expected[1]):
            reduce_statistics(model, **(options if rank == 1 else {}))
        assert state(model) == before
        assert str(model.state_dict()) == numbers


def _ranks_take_back_what_they_wrote(rank):
    model, put = _model(rank), reduction._put
    numbers = values(model)

    def half(new):
        put(new[:5])
        raise KeyboardInterrupt

    reduction._put = half if rank == 1 else put
    with pytest.raises(KeyboardInterrupt if rank == 1 else RuntimeError):
        reduce_statistics(model)
    reduction._put = put
    assert values(model) == numbers


def _ranks_of_a_group(rank):
    group = dist.new_group([0, 2])
    model = _model(rank)
    if rank == 1:
        with pytest.raises(ValueError, match="this rank is not in the group"):
            reduce_statistics(model, group=group)
        return
    result = reduce_statistics(model, group=group, where="[013]")
    assert [(s.path, s.weights) for s in result.layers] == [
        ("0", (5, 2)),
        ("1", (7, 3)),
        ("3", (6, 6)),
    ]
    mean, var = _merged("0", (5, 0, 2))
    np.testing.assert_allclose(model[0].running_mean, mean, 1e-13)
    np.testing.assert_allclose(model[0].running_var, var, 1e-13)


def _ranks_exchange_once(rank):
    """Names and weights, statistics, and the end; whatever the number of layers."""
    calls, gather = [], dist.all_gather_object
    dist.all_gather_object = lambda *args, **kw: (calls.append(args[1]), gather(*args, **kw))
    whole = _model(rank)
    reduce_statistics(whole)
    assert len(calls) == 3
    assert calls[1].shape == (2, 3 + 4 + 2 + 5)
    at_once, merging._AT_ONCE = merging._AT_ONCE, 4 * RANKS
    cut = _model(rank)
    reduce_statistics(cut)
    assert len(calls) == 3 + 2 + 4
    assert values(cut) == values(whole)
    merging._AT_ONCE, dist.all_gather_object = at_once, gather


def _ranks_that_train(rank, batches, sizes, wanted):
    """DDP without its broadcast, on shards of unequal sizes."""
    model = _trained_model()
    wrapped = DistributedDataParallel(model, **WITHOUT_BROADCAST)
    frozen = values(model[4])
    with torch.no_grad():
        for x in _shards(batches, sizes)[rank]:
            wrapped(x)
    result = reduce_statistics(wrapped)
    assert [s.weights for s in result.layers] == [sizes, sizes, (9,) * RANKS]
    assert values(model[4]) == frozen
    for layer in (model[0], model[2]):
        mean, var = wanted[layer.num_features]
        np.testing.assert_allclose(layer.running_mean, mean, 1e-12)
        np.testing.assert_allclose(layer.running_var, var, 1e-12)
        assert layer.num_batches_tracked == max(sizes)


def _ranks_that_train_on(rank, batches, wanted):
    """Merged, trained further and merged again: still the mean of all batches."""
    model = _trained_model()
    for some in (batches[:3], batches[3:]):
        with torch.no_grad():
            for x in _shards(some, (len(some) // RANKS,) * RANKS)[rank]:
                model(x)
        reduce_statistics(model)
    assert model[0].num_batches_tracked == len(batches) // RANKS
    for layer in (model[0], model[2]):
        np.testing.assert_allclose(layer.running_mean, wanted[layer.num_features][0], 1e-12)


def _shards(batches, sizes):
    ends = np.cumsum(sizes)
    return [batches[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _trained_model():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=None),
        nn.Conv2d(3, 4, 1),
        BatchNorm2d(4, momentum=None),
        nn.Conv2d(4, 5, 1),
        BatchNorm2d(5, statistics=Running()),
    ).double()
    model[4].num_batches_tracked.fill_(9)
    return model


def _ranks(rank, world, batches, sizes, wanted):
    _ranks_merge_by_count(rank)
    _ranks_weigh_by_samples(rank)
    _ranks_that_nobody_tracked(rank)
    _ranks_with_broken_statistics(rank)
    _ranks_that_fail_together(rank)
    _ranks_take_back_what_they_wrote(rank)
    _ranks_of_a_group(rank)
    _ranks_exchange_once(rank)
    _ranks_that_train(rank, batches, sizes, wanted)
    _ranks_that_train_on(rank, batches, wanted)


def test_ranks_end_with_the_statistics_of_all():
    sizes = (5, 1, 3)
    batches = [torch.randn(4, 3, 5, 5).double() * (1 + i) + i for i in range(sum(sizes))]
    # one process with all batches: its mean, and its mean of variances and how far apart the
    # ranks' means lie
    wanted = {}
    model = _trained_model()
    rows = {3: [], 4: []}
    with torch.no_grad():
        for x in batches:
            for index, c in ((0, 3), (2, 4)):
                entering = model[:index](x)
                flat = entering.movedim(1, 0).flatten(1).numpy()
                rows[c].append((flat.mean(1), flat.var(1, ddof=1)))
            model(x)
    for index, c in ((0, 3), (2, 4)):
        means, variances = map(np.stack, zip(*rows[c], strict=True))
        np.testing.assert_allclose(model[index].running_mean, means.mean(0), 1e-12)
        of_ranks = np.stack([part.mean(0) for part in np.split(means, np.cumsum(sizes)[:-1])])
        apart = np.average((of_ranks - means.mean(0)) ** 2, 0, sizes)
        wanted[c] = means.mean(0), variances.mean(0) + apart
    run_ranks(RANKS, _ranks, batches, sizes, wanted)


def test_a_world_of_one_has_nothing_to_merge():
    model = _model(2)
    model[0].running_mean.fill_(torch.nan)  # which is not this repair's to judge
    before = str(model.state_dict())
    for options in ({}, {"samples": 7}, {"where": "[01]"}):
        result = reduce_statistics(model, **options)
        assert (result.ranks, result.layers, result.untracked) == (1, (), ())
        assert repr(result) == (
            "Reduction: one rank, whose statistics are those of all; nothing to merge"
        )
        result.undo()
    assert str(model.state_dict()) == before


@pytest.mark.as_installed
@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (3, {}, TypeError, "takes a torch.nn.Module, got int"),
        (nn.Linear(1, 1), {}, ValueError, "Linear has no batch norm layer with running statistics"),
        (BatchNorm2d(3), {"samples": True}, TypeError, "whole number"),
        (BatchNorm2d(3), {"where": "a"}, ValueError, r"where='a' means none of .*\[''\]"),
        (nn.LazyBatchNorm2d(), {}, ValueError, "the model.*lazy"),
    ],
)
def test_mistakes_are_told(model, options, error, message):
    with pytest.raises(error, match=message):
        reduce_statistics(model, **options)


def test_the_layers_that_differ_most_come_first():
    layers = tuple(
        reduction.Spread(path, weights, 0.5 * most, most, rank, 1.25)
        for path, weights, most, rank in (
            ("stem", (1200, 800), 0.25, 1),
            ("", (5, 5), 3.5, 0),
        )
    )
    assert repr(reduction.Reduction(2, layers, ("head.norm",), ())) == (
        "Reduction: 2 layers over 2 ranks\n"
        "  layer      means apart  at most  of rank  std at most  weight of a rank\n"
        "  the model  1.8 σ        3.5 σ    0        ×1.25        5\n"
        "  stem       0.12 σ       0.25 σ   1        ×1.25        800 to 1,200\n"
        "never tracked, left alone: head.norm"
    )

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm2d
from batchnorm.repair.recalibration import recalibrate, recalibration
from processes import run_ranks
from recalibrated import (
    UPSTREAMS,
    Breaks,
    broken,
    images,
    interrupted,
    plain,
    pooled,
    state,
    values,
)


def _share(batches, rank):
    return [batches[:3], [], batches[3:]][rank]


def _ranks_pool(rank, batches, wanted):
    """As one process with all the batches, whatever each rank has, to the same bits."""
    for upstream, want in wanted.items():
        for wrap in (lambda model: model, DistributedDataParallel):
            model = plain(nn.SyncBatchNorm if wrap is not DistributedDataParallel else BatchNorm2d)
            model.load_state_dict(want["before"])
            wrapped = wrap(model)
            result = recalibrate(wrapped, iter(_share(batches, rank)), upstream=upstream)
            assert (result.batches, result.samples) == (5, 15)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, want["after"][name], rtol=1e-5, atol=1e-6)
            everyone = [None] * 3
            dist.all_gather_object(everyone, values(model))
            assert everyone == [everyone[0]] * 3


def _ranks_fail_together(rank, batches):
    nan = [torch.full_like(batches[0], torch.nan)] if rank == 2 else _share(batches, rank)
    error = LookupError("on purpose")
    mine = _share(batches, rank)

    def frozen(model):
        model.norm2.eval()

    def breaks_late(model):
        model.drop = Breaks(error, 2)

    for failing, kind, data, prepare, upstreams in (
        (1, "LookupError: on purpose", broken([], error) if rank == 1 else mine, None, ["batch"]),
        (2, "LookupError: on purpose", mine, breaks_late if rank == 2 else None, ["running"]),
        (2, "ValueError: BatchNorm2d 'norm1', batch 0", nan, None, UPSTREAMS),
        (2, "TypeError: batches must be", batches[0] if rank == 2 else mine, None, UPSTREAMS),
        (None, "all ranks must recalibrate the same", mine, frozen if rank else None, UPSTREAMS),
        (None, "at least one batch, got none", [], None, UPSTREAMS),
    ):
        for upstream in upstreams:
            model = plain()
            if prepare:
                prepare(model)
            before, numbers = state(model), values(model)
            told = f"rank {failing} of 3 failed with {kind}"
            its_own = failing in (None, rank)
            kinds = (LookupError, ValueError, TypeError) if its_own else RuntimeError
            with pytest.raises(kinds, match=kind.partition(": ")[2] or kind if its_own else told):
                recalibrate(model, data, upstream=upstream)
            assert state(model) == before
            assert values(model) == numbers


def _ranks_take_back_what_they_wrote(rank, batches):
    model, put = plain(), recalibration._put
    numbers = values(model)
    if rank == 1:
        recalibration._put = interrupted(put, 2)
    with pytest.raises(KeyboardInterrupt if rank == 1 else RuntimeError):
        recalibrate(model, batches)
    recalibration._put = put
    assert values(model) == numbers


def _ranks_of_a_group(rank, batches):
    group = dist.new_group([0, 2])
    layer = nn.BatchNorm2d(3)
    if rank == 1:
        with pytest.raises(ValueError, match="this rank is not in the group"):
            recalibrate(layer, batches, group=group)
        return
    recalibrate(layer, _share(batches, rank), group=group)
    np.testing.assert_allclose(layer.running_mean, pooled(batches)[0], rtol=1e-5, atol=1e-6)


def _ranks(rank, world, batches, wanted):
    _ranks_pool(rank, batches, wanted)
    _ranks_fail_together(rank, batches)
    _ranks_take_back_what_they_wrote(rank, batches)
    _ranks_of_a_group(rank, batches)


def test_ranks_pool_unequal_shares_and_fail_together():
    batches, wanted = images(4, 3, 5, 2, 1), {}
    for upstream in UPSTREAMS:
        model = plain()
        before = copy.deepcopy(model.state_dict())
        recalibrate(model, batches, upstream=upstream)
        wanted[upstream] = {"before": before, "after": model.state_dict()}
    run_ranks(3, _ranks, batches, wanted)

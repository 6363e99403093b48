"""Real processes of the lab: what they give, and what becomes of one that fails."""

import time
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from batchnorm.lab.ranks import run_on_ranks


def summed(rank, world, numbers):
    total = numbers[rank].clone()
    dist.all_reduce(total)
    return {"rank": rank, "world": world, "total": total.tolist()}


def failing(rank, world):
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_every_rank_answers_in_its_place():
    found = run_on_ranks(summed, 2, torch.tensor([[1.0, 2.0], [10.0, 20.0]]))
    expected = [{"rank": r, "world": 2, "total": [11.0, 22.0]} for r in range(2)]
    assert found == expected


def failing_and_lingering(rank, world):
    if rank == 1:  # its process ends long after the other one has lost it
        Thread(target=time.sleep, args=(30,)).start()
    failing(rank, world)


@pytest.mark.parametrize("function", [failing, failing_and_lingering])
def test_what_one_rank_raises_ends_all(function):
    with pytest.raises(ProcessRaisedException, match="rank 1 has had enough") as raised:
        run_on_ranks(function, 2)
    assert raised.value.error_index == 1

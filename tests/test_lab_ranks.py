"""Real processes of the lab: what they give, and what becomes of one that fails."""

import pytest
import torch
import torch.distributed as dist

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


def test_what_one_rank_raises_ends_all():
    with pytest.raises(Exception, match="rank 1 has had enough"):
        run_on_ranks(failing, 2)

"""What a rank sends, against rings and exchanges played through, and against real layers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import BatchNorm1d, BatchNorm2d, Sync
from batchnorm.planning import measure_network, plan
from batchnorm.planning.traffic import NOTHING, Traffic, all_reduce, backward, exchange, forward
from processes import run_ranks


def played_ring_all_reduce(ranks, payload):
    """Each rank's messages and bytes: its part goes around to be summed, and around again."""
    parts = [payload / ranks] * ranks
    messages, sent = 0, 0.0
    for turn in range(2 * (ranks - 1)):
        messages += 1
        sent += parts[(turn + 1) % ranks]
    return Traffic(1, messages, sent)


@pytest.mark.parametrize("ranks", [2, 3, 8, 4096])
def test_a_ring_s_all_reduce_sends_what_one_played_through_does(ranks):
    ours, played = all_reduce(ranks, 1024.0), played_ring_all_reduce(ranks, 1024.0)
    assert ours.messages == played.messages
    assert ours.bytes == pytest.approx(played.bytes)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_exchange_sends_to_everybody_else(ranks):
    sent = [(i, j) for i in range(ranks) for j in range(ranks) if i != j]
    mine = [pair for pair in sent if pair[0] == 0]
    assert exchange(ranks, 100.0) == Traffic(1, len(mine), 100.0 * len(mine))


def test_of_a_layer_by_hand():
    # 64 channels, 4 ranks: 129 numbers of 8 bytes to 3 others
    assert forward(64, 4) == Traffic(1, 3, 3 * 129 * 8.0)
    assert backward(64, 4, "gloo") == Traffic(1, 3, 3 * 128 * 8.0)
    assert backward(64, 4, "nccl") == Traffic(1, 6, 2 * 3 / 4 * 128 * 8)


def test_one_rank_sends_nothing():
    assert forward(64, 1) == backward(64, 1, "gloo") == backward(64, 1, "nccl") == NOTHING
    assert NOTHING + forward(3, 2) == forward(3, 2)
    assert forward(3, 2).times(2) == forward(3, 2) + forward(3, 2)


class Sent(TorchDispatchMode):
    """The collectives that gloo is asked for, and what they take to other ranks."""

    def __init__(self):
        super().__init__()
        self.collectives, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.c10d.alltoall_base_:
            self.collectives += 1
            mine = args[1].nbytes // dist.get_world_size()
            self.bytes += args[1].nbytes - mine
        else:
            assert func.namespace != "c10d", func
        return func(*args, **(kwargs or {}))


def _send(rank, world):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        BatchNorm2d(6, statistics=Sync()),
        nn.Flatten(),
        nn.Linear(24, 5),
        BatchNorm1d(5, statistics=Sync()),
    )
    with Sent() as sent:
        model(torch.randn(3, 3, 4, 4)).sum().backward()
    choice = plan(model, ranks=world, batch=3).choices[-1]
    assert choice.group == world
    assert sent.collectives == choice.traffic.collectives == 4
    assert sent.bytes == choice.traffic.bytes

    network = measure_network(rounds=1)
    assert network.backend == "gloo"
    numbers = torch.tensor([network.collective, network.message, network.byte]).double()
    assert (numbers >= 0).all()
    assert numbers.sum() > 0
    everyone = [torch.empty_like(numbers) for _ in range(world)]
    dist.all_gather(everyone, numbers)
    assert all(torch.equal(each, numbers) for each in everyone)


def test_layers_send_what_the_plan_says_and_all_ranks_measure_the_same_network():
    run_ranks(4, _send)

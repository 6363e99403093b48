"""What is measured of models that see the future, on models of which it is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm1d
from batchnorm.lab.data import Examples
from batchnorm.lab.foresight import loss_by, moved, read_ahead, reading, with_other_future

SYMBOLS = 5


def drawn(n=12, length=8):
    whole = torch.randint(SYMBOLS, (n, length + 1), generator=torch.Generator().manual_seed(0))
    return Examples(whole[:, :-1], whole[:, 1:])


class Blind(nn.Module):
    """Sees each symbol by itself."""

    def forward(self, x):
        return F.one_hot(x, SYMBOLS).double()


class Cheat(nn.Module):
    """Answers with the next symbol; in training alone."""

    def forward(self, x):
        ahead = x.roll(-1, 1) if self.training else x
        return 10.0 * F.one_hot(ahead, SYMBOLS).double()


def test_another_future_is_the_next_batch_s():
    x = torch.arange(24).view(6, 4)
    changed = with_other_future(x, 3, 2)
    assert torch.equal(changed[:, :3], x[:, :3])
    assert changed[:, 3].tolist() == [11, 15, 19, 23, 3, 7]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_who_sees_no_future_gains_nothing_by_it(mode):
    examples = drawn()
    assert moved(Blind(), examples.x, 4, mode=mode, batch=4) == 0
    assert read_ahead(Blind(), examples, (2, 4), mode=mode, batch=4) == 0


def test_who_reads_ahead_gains_in_training_mode():
    examples = drawn()
    assert moved(Cheat(), examples.x, 4, mode="train", batch=4) == 1
    assert moved(Cheat(), examples.x, 4, mode="eval", batch=4) == 0
    gain = read_ahead(Cheat(), examples, (4,), mode="train", batch=4)
    # right for sure with its own future; with another's, wrong wherever the symbols differ
    own, other = examples.x[:, 4], examples.x.roll(-4, 0)[:, 4]
    assert gain == pytest.approx(10 * float((own != other).double().mean()), rel=1e-6)
    assert read_ahead(Cheat(), examples, (4,), mode="eval", batch=4) == 0


def test_a_loss_is_the_mean_of_its_places():
    examples = drawn()
    log = math.log(math.exp(1) + SYMBOLS - 1)
    right = (examples.x == examples.y).double()
    assert loss_by(Blind(), examples, mode="eval", batch=4) == pytest.approx(
        log - float(right.mean()), rel=1e-6
    )
    assert loss_by(Blind(), examples, mode="eval", batch=4, places=slice(2, 3)) == pytest.approx(
        log - float(right[:, 2].mean()), rel=1e-6
    )


def test_reading_leaves_the_network_as_it_was():
    network = BatchNorm1d(3).train()
    with reading(network, "train"):
        assert not network(torch.randn(8, 3)).requires_grad
    assert network.training
    assert torch.equal(network.running_mean, torch.zeros(3))
    with reading(network, "eval"):
        assert not network.training
    assert network.training

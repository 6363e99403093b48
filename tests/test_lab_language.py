"""Training and evaluating a model of language."""

import math

import pytest
import torch
from torch import nn

from batchnorm.lab.data import CHARACTERS
from batchnorm.lab.language import KNOWS_NOTHING, nats, train_language


class Bigrams(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(CHARACTERS, CHARACTERS)
        nn.init.zeros_(self.table.weight)

    def forward(self, x):
        return self.table(x)


def test_what_knows_nothing_has_the_loss_of_equal_chances():
    text = torch.arange(400) % CHARACTERS
    assert nats(Bigrams(), text, length=8, windows=5) == pytest.approx(math.log(CHARACTERS))


def test_bigrams_are_learned_and_the_mode_is_left():
    network = Bigrams().eval()
    text = torch.arange(400) % 5
    run = train_language(network, text, rate=0.1, steps=100, batch=8, length=8)
    assert network.training
    assert run.losses[0] == pytest.approx(KNOWS_NOTHING)
    assert nats(network, text, length=8, windows=50) < 0.05
    assert network.training


def test_what_gave_no_number_counts_as_knowing_nothing():
    network = Bigrams()
    network.table.weight.data.fill_(math.nan)
    run = train_language(network, torch.arange(400) % 5, rate=0.1, steps=10, length=8)
    assert run.diverged
    assert len(run.losses) == 1
    assert nats(network, torch.arange(400) % 5, length=8, windows=5) == KNOWS_NOTHING

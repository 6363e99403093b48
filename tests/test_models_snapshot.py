"""Putting a model back: every attribute, buffer, mode and class, and the random state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.models.snapshot import Snapshot, left_as_it_was, undone_on_failure


class Keeps(nn.Module):
    """A model that keeps things while it runs, in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen: list[torch.Tensor] = []
        self.last = None

    def forward(self, x):
        self.seen.append(x)
        self.last = self.norm(self.conv(x))
        self.register_buffer("extra", x.mean())
        return nn.functional.dropout(self.last)


def as_numbers(model):
    return {key: value.tolist() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_buffers_modes_and_random_state_come_back(fails):
    model = Keeps().train()
    model.norm.eval()
    before, random = as_numbers(model), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), left_as_it_was(model):
        model.train()(torch.randn(2, 3, 8, 8))
        assert model.norm.num_batches_tracked == 1
        assert not torch.equal(torch.get_rng_state(), random)
        1 / (0 if fails else 1)
    assert as_numbers(model) == before
    assert (model.training, model.norm.training) == (True, False)
    assert (model.seen, model.last) == ([], None)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_put_back_is_the_same_tensor():
    model = Keeps()
    mean, weight = model.norm.running_mean, model.norm.weight
    before = Snapshot(model)
    model.norm.running_mean = torch.ones(4)
    model.norm.weight = nn.Parameter(torch.zeros(4))
    before.restore()
    assert model.norm.running_mean is mean
    assert model.norm.weight is weight


def test_a_failure_undoes_classes_and_modules_too():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    norm, act = model

    def interrupted():
        with undone_on_failure(model):
            norm.__class__ = BatchNorm2d
            norm.statistics = "something"
            model[1] = nn.Identity()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(norm) is nn.BatchNorm2d
    assert not hasattr(norm, "statistics")
    assert list(model) == [norm, act]


def test_a_success_stays_and_can_be_undone_later():
    model = nn.Linear(2, 2)
    before = model.weight.tolist()
    with undone_on_failure(model, parameters=True) as was, torch.no_grad():
        model.weight.zero_()
    assert model.weight.tolist() == [[0, 0], [0, 0]]
    was.restore()
    assert model.weight.tolist() == before


def test_parameters_values_are_put_back_only_where_asked():
    model = nn.Linear(2, 2)
    was = Snapshot(model)
    with torch.no_grad():
        model.weight.zero_()
    was.restore()
    assert model.weight.tolist() == [[0, 0], [0, 0]]

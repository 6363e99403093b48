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


def with_buffers(**buffers):
    model = nn.BatchNorm1d(3)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def fails_within(model, action):
    """The user's own error comes out, whatever happens when the model is put back."""

    def fails():
        with undone_on_failure(model):
            action()
            raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"):
        fails()


def test_buffers_that_cannot_be_written_are_left_alone_where_nobody_wrote_them():
    model = with_buffers(
        expanded=torch.tensor([torch.nan]).expand(3),
        sparse=torch.eye(3).to_sparse(),
        signs=torch.tensor([-0.0, torch.nan]),
        complex=torch.full((2,), 1j, dtype=torch.complex128),
        empty=torch.zeros(0, 3),
    )
    with torch.inference_mode():
        model.register_buffer("inference", torch.arange(3.0))
    version = model.expanded._version, model.signs._version
    fails_within(model, lambda: model(torch.randn(4, 3)))
    assert model.running_mean.tolist() == [0, 0, 0]
    assert model.num_batches_tracked == 0
    assert (model.expanded._version, model.signs._version) == version


def test_expanded_buffers_that_a_pass_wrote_come_back():
    model = with_buffers(running_mean=torch.zeros(1).expand(3), table=torch.ones(1, 3).expand(2, 3))
    with left_as_it_was(model):
        model(torch.randn(4, 3) + 5)
        model.table[0] = torch.tensor([7.0, 8.0, 9.0])
        assert model.running_mean[0] > 1
    assert model.running_mean.tolist() == [0, 0, 0]
    assert model.running_mean.stride() == (0,)
    assert model.table.tolist() == [[1, 1, 1]] * 2


def test_values_come_back_bit_by_bit():
    model = with_buffers(signs=torch.tensor([-0.0, torch.nan]), flags=torch.tensor([True, False]))
    with left_as_it_was(model):
        model.signs.copy_(torch.tensor([0.0, 1.0]))
        model.flags.logical_not_()
    assert torch.signbit(model.signs).tolist() == [True, False]
    assert model.signs[1].isnan()
    assert model.flags.tolist() == [True, False]


@pytest.mark.parametrize("inside", [False, True])
def test_models_built_in_inference_mode_come_back(inside):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.append(nn.BatchNorm1d(3))  # a usual one
    before = as_numbers(model)
    with torch.inference_mode(inside), left_as_it_was(model), torch.inference_mode():
        model(torch.randn(4, 3) + 5)
        assert as_numbers(model) != before
    assert as_numbers(model) == before


def test_a_tensor_that_cannot_be_written_does_not_stop_the_others():
    model = with_buffers(odd=torch.zeros(4))
    model.running_mean.data = torch.zeros(5)

    def changes():
        model.running_mean.data = torch.ones(7)
        model.odd.fill_(1)

    with pytest.warns(RuntimeWarning, match=r"1 tensors .* The first of shape \(5,\)"):
        fails_within(model, changes)
    assert model.odd.tolist() == [0] * 4

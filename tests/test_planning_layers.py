import math

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, LazyBatchNorm2d, Running
from batchnorm.audit import audit
from batchnorm.planning import PlannedLayer, plan
from batchnorm.planning.layers import layers_in, layers_on, layers_shown


class Twice(nn.Module):
    """Registers its layers in another order than it calls them, and one of them it calls twice."""

    def __init__(self):
        super().__init__()
        self.last = BatchNorm1d(4)
        self.first = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        x = self.first(torch.relu(self.first(x)))
        return self.last(self.linear(x.mean((2, 3))))


def test_without_an_input_the_channels_of_the_registered_layers_are_known():
    assert layers_in(Twice()) == [PlannedLayer("last", 4), PlannedLayer("first", 3)]


def test_an_input_shows_order_calls_and_positions():
    shown = layers_shown(Twice(), torch.randn(5, 3, 6, 2), None)
    assert shown == [
        PlannedLayer("first", 3, calls=2, positions=12.0, most=12.0),
        PlannedLayer("last", 4, calls=1, positions=1.0, most=1.0),
    ]


@pytest.mark.parametrize(
    "freeze",
    [
        lambda m: m.first.eval(),
        lambda m: setattr(m, "first", BatchNorm2d(3).freeze()),
        lambda m: setattr(m, "first", BatchNorm2d(3, statistics=Running(updates=True))),
    ],
)
def test_frozen_layers_are_not_synchronized(freeze):
    model = Twice()
    freeze(model)
    assert [layer.path for layer in layers_in(model)] == ["last"]
    assert [layer.path for layer in layers_shown(model, torch.randn(4, 3, 6, 2), None)] == ["last"]


def test_a_model_that_lies_in_eval_mode_is_one_that_will_train():
    assert len(layers_in(Twice().eval())) == 2
    assert len(layers_shown(Twice().eval(), torch.randn(4, 3, 6, 2), None)) == 2


def test_lazy_layers_need_an_input():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"^1 is lazy: its channels are not known before"):
        layers_in(model)
    model(torch.randn(2, 3, 2, 2))
    assert layers_in(model) == [PlannedLayer("1", 5)]


def normal(number, size, *shape, alike=False):
    """Batches of normal values; with `alike`, those of a sample are one and the same."""
    made = [torch.randn(size, *shape) for _ in range(number)]
    return [x[..., :1, :1].expand_as(x).contiguous() for x in made] if alike else made


def test_independent_positions_are_worth_as_many_values_and_equal_ones_are_worth_one():
    model = nn.Sequential(BatchNorm2d(64))
    (independent,) = layers_on(model, normal(32, 16, 64, 4, 4), None)
    assert independent.positions == 16
    assert independent.least == independent.most == pytest.approx(16, rel=0.1)
    (alike,) = layers_on(model, normal(32, 16, 64, 4, 4, alike=True), None)
    assert alike.positions == 16
    assert alike.least == pytest.approx(1, rel=0.1)


def test_the_noise_is_the_audit_s():
    model, batches = Twice(), normal(8, 6, 3, 4, 4)
    audited = {layer.path: layer.noise for layer in audit(model, batches).profiles}
    for layer in layers_on(model, batches, None):
        assert layer.measured == audited[layer.path]
        assert layer.samples == pytest.approx(6)
        assert layer.noise(6) == pytest.approx(audited[layer.path].value)
        assert layer.noise(24) == pytest.approx(audited[layer.path].value / 2)


def test_batches_of_several_sizes_stand_for_their_harmonic_mean():
    batches = [x for size in (4, 12) for x in normal(200, size, 3)]
    order = torch.randperm(len(batches))
    (layer,) = layers_on(nn.Sequential(BatchNorm1d(3)), [batches[i] for i in order[:32]], None)
    sizes = [len(batches[i]) for i in order[:32]]
    assert layer.samples == pytest.approx(len(sizes) / sum(1 / size for size in sizes))
    assert layer.positions == pytest.approx(1)
    # twice the differences' squares are 1/4 and 1/12 in turn: one value a sample
    assert layer.least == pytest.approx(1, rel=0.4)


def test_a_layer_whose_batches_never_differ_has_no_noise():
    x = torch.randn(8, 3)
    (layer,) = layers_on(nn.Sequential(BatchNorm1d(3)), [x] * 5, None)
    assert layer.least == math.inf
    assert layer.noise(1) == 0.0


def test_the_model_is_left_as_it_was():
    model = Twice()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    plan(model, ranks=4, batch=2, batches=normal(5, 4, 3, 4, 4))
    plan(model, ranks=4, batch=2, example=torch.randn(4, 3, 4, 4))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_batches_are_called_as_models_are():
    def named(model, batch):
        return model(batch["image"])

    batches = [{"image": x} for x in normal(4, 6, 3, 4, 4)]
    shown = layers_on(Twice(), batches, named)
    assert [layer.path for layer in shown] == ["first", "last"]


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="known from 4 batches on, got 3"):
        layers_on(Twice(), normal(3, 4, 3, 4, 4), None)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match=r"a batch has a tensor, \(n, \.\.\.\), got list without"):
        layers_on(Twice(), [[1]] * 4, lambda model, batch: model(torch.randn(4, 3, 4, 4)))

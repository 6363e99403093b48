import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.repair.recalibration import recalibrate
from batchnorm.repair.rematerialization import rematerialize
from recalibrated import far_off, images, plain, pooled, values


def test_the_walk_ends_each_pass_at_its_layer():
    model, calls = plain(), {"conv1": 0, "conv2": 0, "conv3": 0, "last": 0}
    for path in calls:
        model.get_submodule(path).register_forward_hook(
            lambda *_, path=path: calls.__setitem__(path, calls[path] + 1)
        )
    recalibrate(model, images(4, 3), upstream="running")
    assert calls == {"conv1": 6, "conv2": 6, "conv3": 4, "last": 2}


def test_the_walk_skips_batches_that_do_not_reach_a_layer():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.norm3, self.calls = nn.BatchNorm2d(3), []

        def forward(self, x):
            self.calls.append(len(x))
            x = self.norm1(x)
            if len(x) > 3:
                x = self.norm2(x + 1)
            return self.norm3(2 * x)

    model, batches = Routed(), images(3, 4)
    recalibrate(model, batches, upstream="running")
    assert model.calls == []  # attributes too are what they were
    assert far_off(model, batches) < 1e-6  # norm3 came last, though the first batch skips norm2
    seen = []
    recalibrate(
        model, batches, upstream="running", forward=lambda m, x: (seen.append(len(x)), m(x))
    )
    assert seen == [3, 4, 4, 3, 4]


def test_a_model_that_works_in_place_gets_the_same_batches_in_every_pass():
    class Centers(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm2(self.norm1(x.mul_(0.5).add_(1)))

    batches, model = images(3, 4), Centers()
    originals = [x.clone() for x in batches]
    recalibrate(model, batches, upstream="running")
    assert all(map(torch.equal, batches, originals))
    np.testing.assert_allclose(
        model.norm1.running_mean, pooled([x * 0.5 + 1 for x in originals])[0], rtol=1e-5
    )
    assert far_off(model, [x.clone() for x in batches]) < 1e-6


def test_single_samples_are_enough_for_the_walk():
    model, x = (
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)),
        torch.randn(9, 2),
    )
    recalibrate(model, x.split(1), upstream="running")
    assert far_off(model, [x]) < 1e-6
    with pytest.raises(ValueError, match=r"'1', batch 0 \(from 0\): one value per channel"):
        recalibrate(model, x.split(1))


def test_the_walk_leaves_no_hooks_of_rematerialization_behind():
    model, batches = plain(BatchNorm2d, act="relu"), images(4, 3)
    recalibrate(twin := copy.deepcopy(model), batches, upstream="running")
    with rematerialize(model):
        recalibrate(model, batches, upstream="running")
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert values(model) == values(twin)


class Catches(nn.Module):
    """Does with an exception of a part what a model might."""

    def __init__(self, model, then):
        super().__init__()
        self.model, self.then, self.after = model, then, nn.BatchNorm2d(3)

    def forward(self, x):
        try:
            self.model(x)
        except Exception as error:
            if self.then == "another":
                raise LookupError("it failed") from error
            self.model(2 * x)  # once more
        self.after(x)


@pytest.mark.parametrize("then", ["another", "on"])
def test_the_walk_ends_its_passes_whatever_the_model_does_about_it(then):
    model, batches = plain(), images(4, 3)
    catching = Catches(copy.deepcopy(model), then)
    for each in (model, catching):
        recalibrate(each, batches, upstream="running")
    assert values(catching.model) == values(model)
    np.testing.assert_allclose(catching.after.running_var, pooled(batches)[1], rtol=1e-5)


class Halves(nn.Sequential):
    """Works in place."""

    def forward(self, x):
        return super().forward(x.mul_(0.5))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda batch: batch),
        (lambda x: [x, "label"], lambda batch: batch[0]),
        (lambda x: {"image": x}, lambda batch: batch["image"]),
        (lambda x: SimpleNamespace(image=x.detach()), lambda batch: batch.image),
    ],
)
def test_batches_are_copied_with_a_graph_behind_them_or_of_any_class(wrap, unwrap):
    weight = torch.full((), 2.0, requires_grad=True)
    batches = [wrap(x * weight) for x in images(4, 3)]
    before = [unwrap(batch).detach().clone() for batch in batches]
    model = Halves(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    recalibrate(model, batches, upstream="running", forward=lambda m, batch: m(unwrap(batch)))
    mean, _ = pooled([x / 2 for x in before])
    np.testing.assert_allclose(model[0].running_mean, mean, rtol=1e-5)
    assert all(torch.equal(unwrap(batch), x) for batch, x in zip(batches, before, strict=True))

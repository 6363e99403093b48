import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, Ghost
from batchnorm.layers.adoption import adopt, is_adoptable, is_adopted, release

PAIRS = [
    (nn.BatchNorm1d, BatchNorm1d, (4, 3)),
    (nn.BatchNorm2d, BatchNorm2d, (4, 3, 2, 2)),
    (nn.BatchNorm3d, BatchNorm3d, (4, 3, 2, 1, 2)),
]


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
@pytest.mark.parametrize("without", ["nothing", "affine", "track_running_stats"])
def test_there_and_back(theirs, ours, shape, without):
    options = {} if without == "nothing" else {without: False}
    layer = theirs(3, eps=1e-3, momentum=None, **options)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(type(layer)))
    twin, tensors = copy.deepcopy(layer), [*layer.parameters(), *layer.buffers()]
    before = dict(vars(layer))
    adopt(layer)
    assert (type(layer), is_adopted(layer), is_adoptable(layer)) == (ours, True, False)
    x = torch.randn(shape)
    for training in (True, True, False):
        torch.testing.assert_close(layer.train(training)(x), twin.train(training)(x))
    assert calls[0] is ours
    now = [*layer.parameters(), *layer.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert list(layer.state_dict()) == list(twin.state_dict())
    release(layer.train())
    assert (type(layer), is_adopted(layer), is_adoptable(layer)) == (theirs, False, True)
    assert list(vars(layer)) == list(before)
    assert all(vars(layer)[name] is value for name, value in before.items())
    torch.testing.assert_close(layer(x), twin.train()(x))


def test_copies_of_an_adopted_layer_can_be_given_back():
    layer = nn.BatchNorm1d(3)
    adopt(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own
        assert type(copied) is BatchNorm1d
        release(copied)
        assert type(copied) is nn.BatchNorm1d


def test_half_precision_statistics_are_float32_meanwhile():
    layer = nn.BatchNorm1d(2).bfloat16()
    layer.running_mean.fill_(3)
    adopt(layer)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    layer(torch.randn(4, 2).bfloat16())
    mean = layer.running_mean
    release(layer)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.bfloat16
    assert torch.equal(layer.running_mean, mean.bfloat16())
    adopt(layer)
    layer.float()
    release(layer)
    assert layer.running_mean.dtype == torch.float32  # as its weight is now


def test_what_would_lose_something_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    parametrized = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    others = [Own(3), parametrized, nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), BatchNorm2d(3)]
    for module in [*others, nn.Linear(2, 2)]:
        kind = type(module)
        with pytest.raises(TypeError, match=f"themselves, got {kind.__name__}, whose own"):
            adopt(module)
        assert type(module) is kind
    for module in (nn.BatchNorm2d(3), BatchNorm2d(3)):
        with pytest.raises(ValueError, match="that was not adopted"):
            release(module)


def test_what_torch_cannot_express_is_not_given_back():
    for change in (
        lambda layer: setattr(layer, "statistics", Ghost(2)),
        lambda layer: layer.freeze(),
    ):
        layer = nn.BatchNorm2d(3)
        adopt(layer)
        change(layer)
        with pytest.raises(ValueError, match="layers cannot express"):
            release(layer)
        assert type(layer) is BatchNorm2d
        assert is_adopted(layer)

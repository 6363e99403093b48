import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm import BatchNorm2d, DomainBatchNorm, Running, domain
from batchnorm.repair.recalibration import recalibrate
from recalibrated import UPSTREAMS, conv, entering, images, plain, pooled, values


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    "freeze",
    [
        lambda layer: layer.eval(),
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: layer.freeze(),
        lambda layer: setattr(layer, "statistics", Running()),
    ],
)
def test_frozen_layers_are_left_alone(freeze, upstream):
    model, batches = plain(BatchNorm2d), images(4, 5)
    freeze(model.norm2)
    before, was = values(model.norm2), model.norm2.training
    result = recalibrate(model, batches, upstream=upstream)
    assert result.frozen == ("norm2",)
    assert [shift.path for shift in result.layers] == ["norm3", "norm1"]
    assert values(model.norm2) == before
    assert model.norm2.training is was
    assert "frozen, left alone: norm2" in repr(result)
    if upstream == "running":  # the layer behind it sees what the frozen one gives
        inputs = entering(model, batches)["norm3"]
        np.testing.assert_allclose(model.norm3.running_mean, pooled(inputs)[0], atol=1e-6)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model,
        lambda model: model.drop.train() and model,  # Monte Carlo dropout
        AveragedModel,  # in training mode itself, as all wrappers at first
        nn.DataParallel,
    ],
)
def test_a_model_for_inference_is_recalibrated_whole(prepare):
    result = recalibrate(prepare(plain().eval()), images(4))
    assert len(result.layers) == 3
    assert result.frozen == ()


def test_frozen_weights_are_no_frozen_statistics():
    model = plain().requires_grad_(False)
    assert len(recalibrate(model, images(4)).layers) == 3
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_without_statistics_have_nothing_to_recalibrate():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    result = recalibrate(model, images(4))
    assert [shift.path for shift in result.layers] == ["1"]
    assert result.frozen == ()


def test_where_narrows():
    model = plain()
    before = values(model.norm1)
    result = recalibrate(model, images(4), where=["norm2", "*3"])
    assert [shift.path for shift in result.layers] == ["norm3", "norm2"]
    assert values(model.norm1) == before


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_layers_never_called_are_named_and_keep_their_statistics(upstream):
    model = plain()
    model.spare = nn.BatchNorm2d(9)
    result = recalibrate(model, images(4, 2), upstream=upstream)
    assert result.uncalled == ("spare",)
    assert model.spare.running_mean.tolist() == [0] * 9
    assert "never called, left alone: spare" in repr(result)


def domains(*names):
    return DomainBatchNorm(BatchNorm2d(3), names)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_each_domain_gets_its_own_batches(upstream):
    model = nn.Sequential(domains("a", "b", "c"), nn.ReLU(), conv(3, 3), domains("a", "b", "c"))
    batches = list(zip("abab", images(3, 4, 5, 2), strict=True))

    def forward(model, batch):
        with domain(batch[0]):
            model(batch[1])

    result = recalibrate(model, batches, forward=forward, upstream=upstream)
    assert result.uncalled == ("0.layers.c", "3.layers.c")
    for name in "ab":
        mine = [x for other, x in batches if other == name]
        layer = model[0].layers[name]
        np.testing.assert_allclose(layer.running_mean, pooled(mine)[0], atol=1e-6)
        if upstream == "running":
            with torch.no_grad():
                deep = [model.eval()[2](model[0](x, domain=name).relu()) for x in mine]
            np.testing.assert_allclose(
                model[3].layers[name].running_mean, pooled(deep)[0], atol=1e-6
            )

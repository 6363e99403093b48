import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm import BatchNorm2d, DomainBatchNorm, Running, domain
from batchnorm.repair.adaptation import adapt
from batchnorm.repair.freezing import freeze, unfreeze
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


FREEZES = {
    "freeze": {},
    "freeze, which learns": {"learns": True},
    "freeze, of the batch": {"statistics": "batch"},
    "freeze, which updates": {"updates": True},
    "freeze, of the batch, which updates": {"statistics": "batch", "updates": True},
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.parametrize("name", FREEZES)
def test_frozen_is_what_training_does_not_move(name, norm, training, upstream):
    options, batches = FREEZES[name], images(4, 5)
    model = plain(norm)
    want = copy.deepcopy(model)
    freeze(model, where="norm2", **options)
    model.train(training)
    before = values(model.norm2)
    result = recalibrate(model, batches, upstream=upstream)
    if options.get("updates"):
        recalibrate(want, batches, upstream=upstream)
        assert result.frozen == ()
        for key, value in want.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    else:
        assert result.frozen == ("norm2",)
        assert values(model.norm2) == before
    unfreeze(model)
    assert [module.training for module in model.modules()] == [training] * 9


def test_the_model_itself_is_frozen():
    model = nn.BatchNorm2d(3)
    freeze(model)
    with pytest.raises(ValueError, match=r"is frozen \(the model, …\): by freeze\(\)"):
        recalibrate(model, images(4))


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_adapted_models_are_refused(upstream):
    model, batches = plain().eval(), images(4, 5)
    want, numbers = copy.deepcopy(model), values(model)
    adaptation = adapt(model, where="norm2")
    with pytest.raises(ValueError, match=r"'norm2' is adapted .* remove\(\) the adaptation"):
        recalibrate(model, batches, where="norm1", upstream=upstream)
    assert values(model) == numbers
    assert [layer.samples for layer in adaptation.layers] == [0]
    adaptation.remove()
    for each in (model, want):
        recalibrate(each, batches, upstream=upstream)
    assert values(model) == values(want)


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

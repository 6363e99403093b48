"""A few of `benchmarks/architectures.py`: other people's models, in which nothing is wrong."""

from __future__ import annotations

import pytest
import torch

from batchnorm.audit import audit

transformers = pytest.importorskip("transformers")

STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [16, 16, 16],
}
MODELS = {
    "ResNet": (12, {**STAGES, "layer_type": "basic"}),
    "MobileNetV2": (52, {"depth_multiplier": 0.25, "image_size": 64}),
    "RegNet": (17, {**STAGES, "groups_width": 8}),
    "Levit": (27, LEVIT),
}


@pytest.fixture(params=MODELS)
def layers_and_model(request, seeded):
    layers, config = MODELS[request.param]
    make = getattr(transformers, f"{request.param}ForImageClassification")
    model = make(make.config_class(**config))
    with torch.no_grad():
        model.eval()(images())  # which leaves hooks of transformers' own
    return layers, model


def images():
    return torch.randn(6, 3, 64, 64)


def calibrate(model):
    torch.optim.swa_utils.update_bn([images() for _ in range(8)], model)


def everything(model):
    """All that an audit must leave as it was, in bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: t.detach().numpy().tobytes() for name, t in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [*module._forward_pre_hooks, *module._forward_hooks, *module._backward_hooks]
            for module in model.modules()
        ],
        "gradients": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state().numpy().tobytes(),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_a_sound_model_is_reported_clean_and_left_as_it_was(
    layers_and_model, training, is_calibrated
):
    layers, model = layers_and_model
    model.train()
    if is_calibrated:
        calibrate(model)
    model.train(training)
    batches = [images() for _ in range(4)]
    before = everything(model)
    for given in (None, batches):
        report = audit(model, given)
        assert [f for f in report.findings if f.severity.value != "info"] == []
        assert report.disabled == {}
        assert report.layers == layers
    after = everything(model)
    assert {what for what in before if before[what] != after[what]} == set()


def test_the_same_model_with_statistics_of_other_data_is_not_reported_clean(layers_and_model):
    _, model = layers_and_model
    model.train()
    calibrate(model)
    report = audit(model, [3 * images() + 2 for _ in range(4)])
    assert "BN103" in {finding.code for finding in report.findings}

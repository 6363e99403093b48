"""Finding batch norms in a model, choosing among them, and putting others in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d, DomainBatchNorm
from batchnorm.models.norms import (
    batch_norms,
    has_usual_forward,
    is_frozen_norm,
    is_meant,
    layers_of_domains,
    replace,
)


def network():
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.Sequential(shared, BatchNorm2d(4)), nn.GroupNorm(2, 4)
    )


def test_each_batch_norm_is_found_once_under_its_first_path():
    assert list(batch_norms(network())) == ["1", "2.1"]
    assert list(batch_norms(nn.SyncBatchNorm(4))) == [""]


def test_a_shared_layer_is_replaced_wherever_it_lies():
    model = network()
    new = nn.Identity()
    replace(model, model[1], new)
    assert model[1] is new
    assert model[2][0] is new
    x = torch.randn(2, 3, 6, 6)
    expected = model[3](model[2][1](model[0](x)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_the_model_itself_has_no_place():
    norm = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match=r"itself the BatchNorm2d.*Sequential"):
        replace(norm, norm, nn.Identity())


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        (None, ["1", "2.1"]),
        ("2.*", ["2.1"]),
        (["1", "2.?"], ["1", "2.1"]),
        (lambda path, layer: isinstance(layer, BatchNorm2d), ["2.1"]),
        ([], []),
    ],
)
def test_layers_are_chosen_by_patterns_or_by_asking(where, meant):
    assert [p for p, m in batch_norms(network()).items() if is_meant(p, m, where)] == meant


def test_of_norms_within_norms_and_at_two_paths_each_is_replaced_where_it_lies():
    # qubvel-org/segmentation_models.pytorch#488: mutated while it iterates named_modules
    outer, shared = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    outer.inner, outer.shared = nn.BatchNorm2d(4), shared
    model = nn.Sequential(outer, shared)
    found = batch_norms(model)
    assert list(found) == ["0", "0.inner", "0.shared"]
    new = {path: nn.Sequential(*norm.children()) for path, norm in found.items()}
    for path, norm in found.items():
        replace(model, norm, new[path])
    assert model[0] is new["0"]
    assert model[0][0] is new["0.inner"]
    assert model[0][1] is model[1] is new["0.shared"]
    assert batch_norms(model) == {}


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.BatchNorm2d):
    pass


def test_a_usual_forward_is_torchs_or_ours_and_not_replaced_by_another():
    for norm in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), BatchNorm2d(4), Named(4)):
        assert has_usual_forward(norm)
        norm.forward = lambda x: x
        assert not has_usual_forward(norm)
    assert not has_usual_forward(Doubled(4))
    assert not has_usual_forward(nn.InstanceNorm2d(4))


def constants(shapes=((4,),) * 4, kind="register_buffer"):
    module = nn.Module()
    for name, shape in zip(("weight", "bias", "running_mean", "running_var"), shapes, strict=True):
        value = torch.ones(shape)
        getattr(module, kind)(name, value if kind == "register_buffer" else nn.Parameter(value))
    return module


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (constants(), True),
        (constants(kind="register_parameter"), False),
        (constants([(4,), (4,), (4,), (3,)]), False),
        (constants([(1, 4, 1, 1)] * 4), False),
        (nn.BatchNorm2d(4), False),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), False),
        (nn.Module(), False),
        (None, False),
    ],
)
def test_a_frozen_norm_holds_four_vectors_that_never_learn(module, is_one):
    assert is_frozen_norm(module) is is_one


def test_the_layers_of_domains_are_found():
    model = nn.Sequential(BatchNorm2d(4), DomainBatchNorm(BatchNorm2d(4), ["a", "b"]))
    found = layers_of_domains(model)
    assert {layer for layer in found if isinstance(layer, BatchNorm2d)} == {
        *model[1].layers.values()
    }
    assert model[0] not in found

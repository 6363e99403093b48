"""Finding batch norms in a model, choosing among them, and putting others in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.models.norms import batch_norms, is_meant, replace


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

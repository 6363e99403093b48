"""A batch norm as one affine map, and whether a layer computes that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm.models.affine import Affine, computes


@given(st.integers(0, 20))
def test_one_map_then_another_is_the_composed_map(seed):
    torch.manual_seed(seed)
    first, second = (Affine(*torch.randn(2, 3, dtype=torch.float64)) for _ in range(2))
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(first.then(second)(x), second(first(x)))
    flat = first.repeated(2)(x.flatten(1))
    torch.testing.assert_close(flat, first(x).flatten(1))


def norm_of(forward, mean=0.0, dtype=torch.float32):
    """A norm in eval mode that computes with its usual output."""
    norm = nn.BatchNorm2d(3).eval().to(dtype)
    norm.running_mean.fill_(mean)
    norm.forward = lambda x: forward(nn.BatchNorm2d.forward(norm, x))
    return norm


@pytest.mark.parametrize("mean", [-100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_norm_does_besides_shows_wherever_its_mean_is(mean, dtype):
    like = torch.zeros(2, 3, 2, 2, dtype=dtype)
    assert computes(norm_of(torch.relu, mean, dtype), torch.relu, like)
    for other in (nn.Identity(), lambda y: 3 * torch.relu(y), nn.ReLU6()):
        assert not computes(norm_of(other, mean, dtype), torch.relu, like)


def test_of_a_norm_that_gives_constants_they_are_compared():
    norm = norm_of(lambda y: y)
    norm.weight.data.zero_()
    norm.bias.data.fill_(2.0)
    assert computes(norm, nn.Identity(), torch.zeros(2, 3, 2, 2))
    assert not computes(norm_of(lambda y: y + 1), nn.Identity(), torch.zeros(2, 3, 2, 2))


def test_numbers_that_are_none_agree_with_their_like():
    norm = norm_of(lambda y: y)
    norm.running_var[0] = torch.nan
    assert computes(norm, nn.Identity(), torch.zeros(2, 3, 2, 2))
    assert not computes(norm, torch.nan_to_num, torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("answer", [lambda y: y[0], lambda y: (y,), lambda y: 1 / 0])
def test_another_shape_another_type_and_a_failure_are_other_answers(answer):
    assert not computes(norm_of(answer), nn.Identity(), torch.zeros(2, 3, 2, 2))

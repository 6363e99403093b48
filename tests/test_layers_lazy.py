import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import Ghost

SHAPES = {"1d": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 5, 2, 2)}


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_lazy_layer_becomes_an_ordinary_one(rank, bias):
    name = f"LazyBatchNorm{rank}"
    theirs, ours = getattr(nn, name)(), getattr(batchnorm, name)(bias=bias, act="relu")
    assert isinstance(ours, getattr(nn, name))
    x = torch.randn(SHAPES[rank])
    torch.testing.assert_close(ours(x), theirs(x).relu())
    assert type(ours) is getattr(batchnorm, f"BatchNorm{rank}")
    assert ours.num_features == 3
    assert (ours.bias is not None) == bias
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_keywords_and_residual_at_the_first_call():
    layer = batchnorm.LazyBatchNorm1d(act="relu", statistics=Ghost(2), affine=False)
    x = torch.randn(4, 3)
    y = layer(x, residual=-x, mask=torch.ones(4, dtype=torch.bool))
    assert layer.statistics == Ghost(2)
    want = batchnorm.BatchNorm1d(3, act="relu", statistics=Ghost(2))(x, residual=-x)
    torch.testing.assert_close(y, want)


def test_statistics_are_float32_in_half_precision():
    layer = batchnorm.LazyBatchNorm1d(dtype=torch.bfloat16)
    layer(torch.randn(4, 3).bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


def test_a_lazy_layer_moves_before_its_first_input():
    layer = batchnorm.LazyBatchNorm1d().half()
    layer(torch.randn(4, 3).half())
    assert (layer.weight.dtype, layer.running_var.dtype) == (torch.float16, torch.float32)


def test_loading_a_state_dict_materializes():
    source = batchnorm.BatchNorm1d(3)
    source(torch.randn(4, 3))
    layer = batchnorm.LazyBatchNorm1d()
    layer.load_state_dict(source.state_dict())
    layer.eval()
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), source.eval()(x))


def test_arguments_by_position():
    layer = batchnorm.LazyBatchNorm1d(1e-3, 0.3, True, True, "cpu", torch.float64)
    assert (layer.eps, layer.momentum) == (1e-3, 0.3)
    assert layer(input=torch.randn(4, 3).double()).dtype == torch.float64


@pytest.mark.as_installed
def test_bad_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="act must be one of"):
        batchnorm.LazyBatchNorm2d(act="rectify")
    with pytest.raises(TypeError, match="statistics must be a policy"):
        batchnorm.LazyBatchNorm2d(statistics=4)

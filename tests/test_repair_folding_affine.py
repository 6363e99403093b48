"""The arithmetic of folding: against float64 NumPy, and against the layers themselves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.repair.folding import fold

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
THEIRS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics, γ and β as no layer begins with them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean") and module.running_mean is not None:
                module.running_mean.normal_(0, 1, generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
                if module.weight is not None:
                    module.weight.normal_(0, 1, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 1, generator=generator)
    return model.eval()


def numpy_affine(norm: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    scale = norm.weight.detach().double().numpy() / np.sqrt(var + norm.eps)
    return scale, norm.bias.detach().double().numpy() - mean * scale


@st.composite
def convolutions(draw) -> tuple[nn.Module, torch.Tensor]:
    """Any convolution, in float64, and an input for it."""
    dims, is_transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    ins, outs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    dilation, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 5)))
    if is_transposed:
        kind, options = TRANSPOSED[dims - 1], {"output_padding": tuple(s - 1 for s in stride)}
        assume(
            all(dilation * (k - 1) + s > 2 * padding for k, s in zip(kernel, stride, strict=True))
        )
    else:
        kind = CONVS[dims - 1]
        options = {"padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular"]))}
    module = kind(
        ins, outs, kernel, stride, padding, groups=groups, dilation=dilation, bias=bias, **options
    )
    return module.double(), torch.randn(2, ins, *[6] * dims, dtype=torch.float64)


norm_options = st.fixed_dictionaries(
    {"eps": st.sampled_from([1e-5, 0.1]), "affine": st.booleans(), "bias": st.booleans()}
)


@settings(max_examples=30)
@given(convolutions(), norm_options, st.booleans())
def test_a_norm_behind_any_convolution_vanishes(drawn, options, is_ours):
    conv, x = drawn
    norm = (OURS if is_ours else THEIRS)[x.ndim - 3](conv.out_channels, **options)
    model = randomized(nn.Sequential(conv, norm.double()))
    with torch.no_grad():
        expected = model(x)
        folding = fold(model, x, tolerance=1e-12, repeats=0)
        assert folding.folded == {"1": ("0",)}
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert not isinstance(model[1], nn.modules.batchnorm._BatchNorm)


@settings(max_examples=30)
@given(convolutions(), norm_options, st.booleans(), st.booleans())
def test_a_norm_before_any_convolution_vanishes_where_the_border_stays(
    drawn, options, is_ours, only_scales
):
    conv, x = drawn
    norm = (OURS if is_ours else THEIRS)[x.ndim - 3](conv.in_channels, **options).double()
    model = randomized(nn.Sequential(norm, conv))
    if only_scales:
        norm.running_mean.zero_()
        if norm.bias is not None:
            nn.init.zeros_(norm.bias)
    bias = conv.bias
    with torch.no_grad():
        expected = model(x)
        # what a constant becomes, over its own mean: what varies is no bias
        conv.bias = None
        constant = conv(torch.ones_like(x))
        conv.bias = bias
        varies = constant.flatten(2).std(2, correction=0).max() > 1e-9
        folding = fold(model, x, tolerance=1e-12, repeats=0)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    if only_scales or isinstance(conv, CONVS):
        expects = only_scales or not varies or conv.padding_mode != "zeros"
        assert bool(folding.folded) >= expects - (constant[0, 0].numel() == 1)
    if varies and not only_scales:
        assert not folding.folded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_norm_next_to_a_linear_layer_vanishes(is_before, options, bias):
    norm = nn.BatchNorm1d(5 if is_before else 3, **options)
    layers = [nn.Linear(5, 3, bias), norm]
    model = randomized(nn.Sequential(*(reversed(layers) if is_before else layers)).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = model(x)
    assert fold(model, x, tolerance=1e-12, repeats=0).folded
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_computed_in_float64_and_rounded_once(dtype):
    conv, norm = nn.Conv2d(3, 4, 2).to(dtype), nn.BatchNorm2d(4)
    model, old = randomized(nn.Sequential(conv, norm)), conv.weight
    scale, shift = numpy_affine(norm)
    weight = conv.weight.detach().double().numpy() * scale[:, None, None, None]
    bias = scale * conv.bias.detach().double().numpy() + shift
    fold(model, torch.randn(2, 3, 4, 4, dtype=dtype), repeats=0)
    assert torch.equal(conv.weight, torch.from_numpy(weight).to(dtype))
    assert torch.equal(conv.bias, torch.from_numpy(bias).to(dtype))
    # which is not what arithmetic in the dtype itself gives
    hasty = old * (norm.weight * (norm.running_var + norm.eps).rsqrt()).to(dtype).view(-1, 1, 1, 1)
    assert not torch.equal(conv.weight, hasty)


def test_subnormal_weights_become_zeros():
    # FasterAI-Labs/fasterai#82: channels with γ next to 0 took a network from 13 to 70 ms
    conv, norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)
    model = randomized(nn.Sequential(conv, norm))
    with torch.no_grad():
        norm.weight[1], norm.bias[1], norm.running_mean[1] = 1e-40, 1e-41, 0
        conv.bias.zero_()
    x = torch.randn(2, 2, 4, 4)
    expected = model(x)
    fold(model, x, repeats=0)
    tiny = torch.finfo(torch.float32).tiny
    for parameter in (conv.weight, conv.bias):
        assert not ((parameter != 0) & (parameter.abs() < tiny)).any()
        assert (parameter[1] == 0).all()
        assert (parameter[0] != 0).all()
    torch.testing.assert_close(model(x), expected)


def test_small_half_precision_weights_stay():
    conv, norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
    nn.init.constant_(conv.weight, 3e-5)  # subnormal in float16, and meant
    model = nn.Sequential(conv, norm).half().eval()
    fold(model, torch.randn(2, 2, 4, 4).half(), repeats=0)
    assert (conv.weight > 2.9e-5).all()


def test_layout_and_requires_grad_are_kept_and_the_old_parameters_too():
    conv = nn.Conv2d(8, 8, 3, bias=False).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    model = randomized(nn.Sequential(conv, nn.BatchNorm2d(8)))
    old, values = conv.weight, conv.weight.detach().clone()
    fold(model, torch.randn(2, 8, 5, 5), repeats=0)
    assert conv.weight is not old
    assert torch.equal(old, values)
    assert conv.weight.stride() == old.stride() != copy.deepcopy(old).contiguous().stride()
    assert (conv.weight.requires_grad, conv.bias.requires_grad) == (False, False)


def test_no_bias_where_none_is_needed():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    model = randomized(nn.Sequential(nn.BatchNorm2d(3, bias=False), conv))
    model[0].running_mean.zero_()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert fold(model, x, repeats=0).folded == {"0": ("1",)}
    assert conv.bias is None
    torch.testing.assert_close(model(x), expected)


def test_a_running_variance_of_zero_is_legal():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].running_var[2] = 0
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert fold(model, x, repeats=0).folded
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
from batchnorm.functional import batch_norm, moments, normalize
from batchnorm.kernels import ACTIVATIONS
from strategies import LAYOUTS, lay_out, tensors

TORCH = {
    "identity": nn.Identity(),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_torch(act, frozen, dtype):
    shape = (6, 3, 5, 4)
    inputs = x, weight, bias, residual = leaves(shape, 3, 3, shape, dtype=dtype)
    dy = torch.randn(shape, dtype=dtype)
    mean, var = torch.randn(3, dtype=dtype), torch.rand(3, dtype=dtype) + 0.1
    if frozen:
        y = normalize(x, mean, var, weight, bias, residual=residual, act=act)
        z = F.batch_norm(x, mean, var, weight, bias)
    else:
        y, _ = batch_norm(x, weight, bias, residual=residual, act=act)
        z = F.batch_norm(x, None, None, weight, bias, training=True)
    want = TORCH[act](z + residual)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, want, **tolerance)
    for ours, theirs in zip(gradients(y, inputs, dy), gradients(want, inputs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_first_and_second_derivatives(act):
    inputs = leaves((4, 2, 3), 2, 2, (4, 2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    mean, var = torch.randn(2).double(), torch.rand(2).double()

    def batch(x, weight, bias, residual):
        return batch_norm(x, weight, bias, residual=residual, act=act, mask=mask, groups=2)[0]

    def frozen(x, weight, bias, residual):
        return normalize(x, mean, var, weight, bias, residual=residual, act=act)

    for f in (batch, frozen):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


def test_third_derivatives():
    (x,) = leaves((3, 2))

    def gradient(x):
        y = batch_norm(x, act="silu")[0]
        return torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x,))


def test_no_weight_no_bias_and_either():
    shape = (5, 3, 4)
    for weight, bias in ((None, None), (leaves(3)[0], None), (None, leaves(3)[0])):
        (x,) = leaves(shape)
        inputs = [t for t in (x, weight, bias) if t is not None]
        y, want = (
            batch_norm(x, weight, bias)[0],
            F.batch_norm(x, None, None, weight, bias, training=True),
        )
        torch.testing.assert_close(y, want)
        for ours, theirs in zip(
            gradients(y, inputs, torch.ones_like(y) + x),
            gradients(want, inputs, torch.ones_like(y) + x),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@given(tensors(max_ratio=10), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_any_layout_of_input_and_gradient(x, layout, gradient_layout):
    dy = lay_out(torch.randn(x.shape, dtype=x.dtype), gradient_layout)
    x = lay_out(x, layout).requires_grad_()
    y, _ = batch_norm(x, act="silu")
    want = oracle.batch_norm(x.detach(), dy, act="silu")
    np.testing.assert_allclose(y.detach(), want.y, rtol=1e-8, atol=1e-8)
    assert y.stride() == torch.empty_like(x).stride()
    (dx,) = torch.autograd.grad(y, x, dy)
    scale = 1 / np.sqrt(want.var.min() + 1e-5)
    np.testing.assert_allclose(dx, want.dx, rtol=1e-5, atol=1e-7 * scale)


def test_channels_last_stays_channels_last():
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y, _ = batch_norm(x, act="relu", residual=torch.randn(4, 3, 5, 6))
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@given(tensors(max_ratio=10), st.sampled_from(["identity", "relu", "sigmoid"]))
def test_masked_elements_neither_count_nor_get_gradient_and_are_zero(x, act):
    mask = torch.rand(len(x), *x.shape[2:]) < 0.7
    mask.flatten()[:2] = True
    dy, residual = torch.randn(2, *x.shape, dtype=x.dtype)
    want = oracle.batch_norm(x, dy, residual=residual, mask=mask, act=act)
    # what lies under the mask must not matter, not even if it is no number
    dirty = torch.where(mask.unsqueeze(1), x, torch.nan).requires_grad_()
    residual = torch.where(mask.unsqueeze(1), residual, torch.inf).requires_grad_()
    y, batch = batch_norm(dirty, residual=residual, mask=mask, act=act)
    np.testing.assert_allclose(y.detach(), want.y, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(batch.mean, want.mean, rtol=1e-9, atol=1e-12)
    assert torch.all(y[~mask.unsqueeze(1).expand_as(y)] == 0)
    dx, d_residual = torch.autograd.grad(y, (dirty, residual), dy)
    scale = 1 / np.sqrt(want.var.min() + 1e-5)
    np.testing.assert_allclose(dx, want.dx, rtol=1e-5, atol=1e-7 * scale)
    np.testing.assert_allclose(d_residual, want.d_residual, rtol=1e-5, atol=1e-7)


def test_an_empty_mask_gives_zeros_and_no_gradient():
    x, weight, bias = leaves((3, 2, 4), 2, 2)
    y, batch = batch_norm(x, weight, bias, mask=torch.zeros(3, 4, dtype=torch.bool))
    assert torch.all(y == 0)
    assert batch.count.tolist() == [0, 0]
    for gradient in gradients(y, (x, weight, bias), torch.ones_like(y)):
        assert torch.all(gradient == 0)


def test_groups_are_normalized_apart():
    x, weight, bias = leaves((6, 3, 4), 3, 3)
    y, batch = batch_norm(x, weight, bias, groups=3)
    parts = [batch_norm(part, weight, bias)[0] for part in x.split(2)]
    torch.testing.assert_close(y, torch.cat(parts))
    assert batch.mean.shape == (3, 3)
    for got, want in zip(
        gradients(y, (x, weight, bias), x.detach()),
        gradients(torch.cat(parts), (x, weight, bias), x.detach()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_moments_that_are_known_already_change_nothing():
    x, weight = leaves((6, 3, 4), 3)
    dy = torch.randn(6, 3, 4, dtype=torch.float64)
    for groups in (1, 2):
        own = moments(x, groups=groups)
        y, _ = batch_norm(x, weight, groups=groups, act="tanh")
        again, same = batch_norm(x, weight, groups=groups, act="tanh", batch=own)
        assert same is own
        torch.testing.assert_close(again, y, rtol=0, atol=0)
        for a, b in zip(
            gradients(again, (x, weight), dy), gradients(y, (x, weight), dy), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_moments_are_constants_to_autograd():
    (x,) = leaves((4, 2))
    assert not moments(x).mean.requires_grad
    assert not batch_norm(x)[1].m2.requires_grad


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(n):
    x, weight, bias = leaves((n, 2, 3), 2, 2)
    y, _ = batch_norm(x, weight, bias)
    y.sum().backward()
    if n == 0:
        assert y.shape == (0, 2, 3)
        assert weight.grad.tolist() == [0, 0]
    else:
        want = oracle.batch_norm(x.detach(), np.ones((n, 2, 3)), weight.detach(), bias.detach())
        np.testing.assert_allclose(y.detach(), want.y, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(weight.grad, want.d_weight, rtol=1e-6, atol=1e-8)


def test_mixed_dtypes_follow_the_wider():
    x = torch.randn(8, 3, 4)
    weight, bias = torch.rand(2, 3)
    for low in (torch.float16, torch.bfloat16):
        y, batch = batch_norm(x.to(low), weight, bias)
        assert y.dtype == low
        assert batch.mean.dtype == torch.float64
        y, _ = batch_norm(x.to(low), weight, bias, residual=x)
        assert y.dtype == torch.float32
    y = normalize(x.double(), weight, bias, weight, bias)
    assert y.dtype == torch.float64
    want = oracle.batch_norm(x, x, weight, bias, frozen=(weight, bias))
    np.testing.assert_allclose(y, want.y, rtol=1e-12)


def test_the_residual_s_gradient_has_its_own_dtype_and_layout():
    x = torch.randn(2, 3, 4, 5).bfloat16().requires_grad_()
    residual = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    for act in (None, "relu"):
        y, _ = batch_norm(x, residual=residual, act=act)
        dx, d_residual = torch.autograd.grad(y.sum(), (x, residual))
        assert (dx.dtype, d_residual.dtype) == (torch.bfloat16, torch.float32)
        expected = (y > 0).float() if act else torch.ones_like(y)
        assert torch.equal(d_residual, expected)


def test_forward_mode_and_functional_transforms():
    x, v = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.1

    def ours(x):
        return batch_norm(x, act="silu")[0]

    def theirs(x):
        return F.silu(F.batch_norm(x, None, None, training=True))

    def frozen(x):
        return normalize(x, mean, var, act="silu")

    for f, g in ((ours, theirs), (frozen, lambda x: F.silu(F.batch_norm(x, mean, var)))):
        for a, b in zip(torch.func.jvp(f, (x,), (v,)), torch.func.jvp(g, (x,), (v,)), strict=True):
            torch.testing.assert_close(a, b)
        pair = torch.stack((x, v))
        torch.testing.assert_close(torch.vmap(f)(pair), torch.stack((g(x), g(v))))
        loss = torch.vmap(torch.func.grad(lambda x, f=f: f(x).square().sum()))(pair)
        want = torch.stack([torch.func.grad(lambda x, g=g: g(x).square().sum())(p) for p in pair])
        torch.testing.assert_close(loss, want)
    with torch.autograd.forward_ad.dual_level():
        dual = ours(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(theirs, (x,), (v,))[1])


@pytest.mark.parametrize("masked", [False, True])  # without a mask the compiled kernels serve
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.as_installed
def test_the_registered_operation_passes_torch_s_own_checks(frozen, masked):
    x, residual, weight, bias = leaves((4, 3, 5), (4, 3, 5), 3, 3, dtype=torch.float32)
    mask = torch.ones(4, 5, dtype=torch.bool) if masked else None
    given = (torch.ones(3, dtype=torch.int64), torch.zeros(3), torch.ones(3))
    arguments = (
        x, residual, mask, weight, bias, *(given if frozen else (None,) * 3),
        frozen, 1, 1e-5, "silu", 0.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.batchnorm.batch_norm.default, arguments)
    torch.library.opcheck(torch.ops.batchnorm.moments.default, (x.detach(), mask, 2))
    if not frozen:
        how = (*(t if t is None else t.detach() for t in arguments[:5]), *given, *arguments[8:])
        torch.library.opcheck(torch.ops.batchnorm.backward_sums.default, (x.detach(), *how))
        sums = (torch.ones(3), torch.ones(3))
        for g, residual in ((None, None), (how[1], how[1])):
            rest = (how[0], residual, *how[2:], *sums)
            torch.library.opcheck(
                torch.ops.batchnorm.backward_input.default, (x.detach(), g, *rest)
            )


BAD = [
    (
        TypeError,
        "floating point input, got torch.int64",
        {"x": torch.ones(4, 3, dtype=torch.int64)},
    ),
    (TypeError, "floating point input, got torch.complex64", {"x": torch.ones(4, 3) * 1j}),
    (ValueError, r"shape \(n, c, \*positions\), got shape \(4,\)", {"x": torch.ones(4)}),
    (
        ValueError,
        r"weight must hold one value per channel, shape \(3,\)",
        {"weight": torch.ones(4)},
    ),
    (ValueError, r"bias must hold one value per channel", {"bias": torch.ones(3, 1)}),
    (
        ValueError,
        r"residual must have the input's shape \(4, 3, 5\)",
        {"residual": torch.ones(4, 3)},
    ),
    (ValueError, r"mask must have shape .* = \(4, 5\)", {"mask": torch.ones(4, 3, 5) > 0}),
    (TypeError, "mask must be of dtype bool", {"mask": torch.ones(4, 5)}),
    (ValueError, "act must be one of identity, relu", {"act": "rectify"}),
    (ValueError, "eps must be positive", {"eps": 0.0}),
    (ValueError, "3 groups for 4 samples", {"groups": 3}),
    (ValueError, "got 0 groups", {"groups": 0}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[b[1] for b in BAD])
@pytest.mark.as_installed
def test_bad_input_is_answered_with_the_invariant_and_what_came(error, message, arguments):
    with pytest.raises(error, match=message):
        batch_norm(**{"x": torch.ones(4, 3, 5), **arguments})


@pytest.mark.as_installed
def test_normalize_checks_its_statistics():
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="mean must hold one value per channel"):
        normalize(x, torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="var must hold one value per channel"):
        normalize(x, torch.zeros(3), torch.ones(4))
    with pytest.raises(ValueError, match="eps must be non-negative, but got -1"):
        normalize(x, torch.zeros(3), torch.ones(3), eps=-1.0)
    assert torch.equal(normalize(x, torch.zeros(3), torch.ones(3), eps=0.0), x)

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
from batchnorm.kernels import (
    ACTIVATIONS,
    BACKENDS,
    Activation,
    Backend,
    Coefficients,
    Epilogue,
    accumulator,
    backend_for,
    coefficients_of,
    cpu,
    gpu,
    reference,
)
from batchnorm.moments import Moments
from devices import HAS_GPU, HAS_KERNELS, on_the_cpu
from strategies import LAYOUTS, lay_out, tensors

GPU = on_the_cpu()
needs_triton = pytest.mark.skipif(not HAS_KERNELS, reason="Triton is not installed")
ON_THREADS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]
EVERY = [*ON_THREADS, pytest.param(GPU, id="gpu", marks=needs_triton)]


@pytest.fixture(params=EVERY)
def backend(request):
    return request.param


def widest(backend):
    """The widest dtype that a backend computes in."""
    return torch.float32 if backend is GPU else torch.float64


def bits(*values):
    return b"".join(v.detach().contiguous().numpy().tobytes() for v in values)


@pytest.mark.parametrize("backend", EVERY)
@given(tensors(max_ratio=10), st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.booleans())
def test_forward_and_backward_agree_with_the_oracle(backend, x, act, with_residual, with_mask):
    with_mask = with_mask and backend is reference
    c, dtype = x.shape[1], widest(backend)
    x = x.to(dtype)
    weight, bias = torch.randn(2, c, dtype=torch.float64).to(dtype)
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    residual = torch.randn(x.shape, dtype=torch.float64).to(dtype) if with_residual else None
    mask = None
    if with_mask:
        mask = torch.rand(len(x), *x.shape[2:]) < 0.7
        mask.flatten()[:2] = True  # at least two values
    want = oracle.batch_norm(x, dy, weight, bias, residual, mask, act=act)
    epilogue = Epilogue(
        residual,
        None if mask is None else mask.unsqueeze(1),
        Activation.of(act),
    )
    with torch.no_grad():
        y, batch = backend.forward(x, weight, bias, 1e-5, epilogue)
        got = backend.backward(dy, x, batch, weight, bias, 1e-5, epilogue, frozen=False)
    # the oracle's derivatives are differences
    wide = dtype == torch.float64
    near = {"rtol": 1e-6, "atol": 1e-7} if wide else {"rtol": 2e-5, "atol": 4e-5}
    exact = 1e-9 if wide else 1e-5
    np.testing.assert_allclose(y, want.y, rtol=exact, atol=exact)
    near_mean = 1e-12 if wide else 1e-7 * np.sqrt(want.var.max()) + 1e-12
    np.testing.assert_allclose(batch.mean, want.mean, rtol=1e-12, atol=near_mean)
    near_var = 0 if wide else 1e-10
    np.testing.assert_allclose(batch.m2 / batch.count, want.var, rtol=exact, atol=near_var)
    assert batch.count.tolist() == want.count.tolist()
    scale = 1 / np.sqrt(want.var.min() + 1e-5)
    np.testing.assert_allclose(got.x, want.dx, rtol=near["rtol"], atol=near["atol"] * scale)
    np.testing.assert_allclose(got.weight, want.d_weight, **near)
    np.testing.assert_allclose(got.bias, want.d_bias, **near)
    if residual is not None:
        np.testing.assert_allclose(got.residual, want.d_residual, **near)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_fusions_are_their_two_halves(backend, act):
    x, dy, residual = torch.randn(3, 8, 3, 5, 5)  # two groups of four samples
    weight, bias = torch.randn(2, 3)
    epilogue = Epilogue(residual, None, Activation.of(act))
    with torch.no_grad():
        y, batch = backend.forward(x, weight, bias, 1e-5, epilogue, 2)
        coefficients = coefficients_of(x, batch, weight, bias, 1e-5)
        applied, again = backend.apply(x, coefficients, epilogue), backend.moments(x, None, 2)
        if backend is GPU:  # which computes coefficients in float32, and in a fusion sums otherwise
            torch.testing.assert_close(y, applied, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(again.mean, batch.mean, rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(again.m2, batch.m2, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(y, applied)
            assert bits(again.mean, again.m2) == bits(batch.mean, batch.m2)

        total, projection, g = backend.backward_reduce(dy, x, coefficients, epilogue)
        inverse = torch.rsqrt(batch.var() + 1e-5)
        slope = -(inverse**2) * projection / batch.count
        offset = -total / batch.count
        dx = backend.backward_apply(g, x, coefficients, Epilogue(), slope, offset)
        whole = backend.backward(dy, x, batch, weight, bias, 1e-5, epilogue, frozen=False)
    torch.testing.assert_close(dx, whole.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(g, whole.residual)
    torch.testing.assert_close((projection * inverse).sum(0).float(), whole.weight)
    torch.testing.assert_close(total.sum(0).float(), whole.bias)


@pytest.mark.parametrize(
    "shape",
    [
        (64, 3, 32, 32),
        (64, 1, 64, 64),  # one output: where PyTorch cuts a sum by threads
        (1, 1, 700, 700),
        (100_000, 1),
        (65_537, 3),  # beyond what some kernels index with 16 bits
        (8, 300, 7, 7),
        (2, 5, 20, 30, 40),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ON_THREADS)
def test_the_same_bits_for_any_number_of_threads(backend, shape, layout):
    x, dy = lay_out(torch.randn(shape), layout), lay_out(torch.randn(shape), layout)
    # not a transcendental one: those are PyTorch's, whose vector and scalar exp differ in a bit
    epilogue = Epilogue(act=Activation.of("relu"))
    seen = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with torch.no_grad():
            y, batch = backend.forward(x, None, None, 1e-5, epilogue)
            got = backend.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
        seen.add(bits(y, batch.mean, batch.m2, got.x))
    assert len(seen) == 1


@pytest.mark.parametrize("shape", [(40, 2, 60, 60), (1, 2, 300, 700), (200_000, 2), (3, 1, 9, 9)])
def test_chunks_cover_every_value_once(backend, shape):
    x = (torch.randn(shape, dtype=torch.float64) + 5).to(widest(backend))
    with torch.no_grad():
        batch = backend.moments(x)
    dims, near = [0, *range(2, x.ndim)], 1e-12 if x.dtype == torch.float64 else 2e-7
    np.testing.assert_allclose(batch.mean, x.double().mean(dims), rtol=near)
    np.testing.assert_allclose(batch.var(), x.double().var(dims, correction=0), rtol=near)
    assert batch.count.tolist() == [x.numel() // x.shape[1]] * x.shape[1]


def test_the_error_does_not_grow_with_the_mean(backend):
    exact = torch.randn(32, 4, 40, 40, dtype=torch.float64)
    for mean, std in ((0.0, 1.0), (3000.0, 1.0), (3000.0, 0.3), (1e6, 1.0)):
        x = (exact * std + mean).float()
        want = oracle.batch_norm(x, x)
        with torch.no_grad():
            y, _ = backend.forward(x, None, None, 1e-5, Epilogue())
        assert np.abs(y.numpy() - want.y).max() < 2e-6
        assert abs(y.std().item() - 1) < 1e-4


def test_values_whose_squares_overflow_float32(backend):
    x = torch.randn(64, 3) * 1e30
    with torch.no_grad():
        y, batch = backend.forward(x, None, None, 1e-5, Epilogue())
    want = oracle.batch_norm(x, x)
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    assert batch.var().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision_is_computed_in_float32(backend, dtype, layout):
    x, dy = (lay_out(t, layout) for t in torch.randn(2, 16, 4, 8, 8).to(dtype))
    epilogue = Epilogue(act=Activation.of("relu"))
    if not backend.serves(x, epilogue):  # the CPU's leaves float16 to the reference
        backend = backend if backend is GPU else backend_for(x, epilogue)
    want = oracle.batch_norm(x.float(), dy.float(), act="relu")
    with torch.no_grad():
        y, batch = backend.forward(x, None, None, 1e-5, epilogue)
        got = backend.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
    assert y.dtype == got.x.dtype == dtype
    ulp = torch.finfo(dtype).eps  # Triton's interpreter cuts bfloat16 off, in place of rounding
    np.testing.assert_allclose(y.float(), want.y, rtol=ulp, atol=ulp)
    np.testing.assert_allclose(got.x.float(), want.dx, rtol=ulp, atol=2 * ulp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing_but_strides(backend, layout):
    x = torch.randn(4, 3, 5, 6)
    x = lay_out(x, layout)
    same = x.contiguous()
    epilogue = Epilogue(act=Activation.of("gelu"))
    with torch.no_grad():
        y, _ = backend.forward(x, None, None, 1e-5, epilogue)
        plain, _ = backend.forward(same, None, None, 1e-5, epilogue)
    torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_agree_with_the_oracle(name):
    z = torch.linspace(-6, 6, 241, dtype=torch.float64)[1::2]  # not at a kink
    act = Activation.of(name)
    np.testing.assert_allclose(act(z), oracle.ACTIVATIONS[name](z.numpy()), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        derivative = act.backward(torch.ones_like(z), z)
    want = oracle._derivative(name, z.numpy())
    np.testing.assert_allclose(derivative, want, rtol=1e-6, atol=1e-8)
    differentiable = act.backward(torch.ones_like(z), z)
    np.testing.assert_allclose(differentiable.detach(), derivative, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.2),
        nn.ELU(0.7),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.Hardswish(),
        nn.Sigmoid(),
        nn.Tanh(),
    ],
    ids=str,
)
def test_modules_name_activations(module):
    z = torch.randn(100, dtype=torch.float64)
    assert torch.equal(Activation.of(module)(z), module(z.clone()))


@pytest.mark.parametrize("act", ["swish", nn.Softmax(), nn.ReLU6(), 3], ids=str)
@pytest.mark.as_installed
def test_unknown_activations_are_named_with_the_known_ones(act):
    with pytest.raises(ValueError, match="act must be one of identity, relu, leaky_relu"):
        Activation.of(act)


def test_a_subclass_of_an_activation_is_not_taken_for_it():
    class Clipped(nn.ReLU):
        def forward(self, x):
            return super().forward(x).clamp(max=1)

    with pytest.raises(ValueError, match="act must be one of"):
        Activation.of(Clipped())


def test_activations_print_as_they_were_asked():
    assert str(Activation.of("leaky_relu")) == "leaky_relu"
    assert str(Activation.of(nn.LeakyReLU(0.2))) == "leaky_relu(0.2)"


def test_coefficients_give_back_what_rounding_the_mean_lost():
    mean = torch.tensor([1e6 + 0.03], dtype=torch.float64)  # float32 rounds it to 1e6
    var = torch.ones(1, dtype=torch.float64)
    center, scale, shift = Coefficients.of(mean, var, None, None, 0.0, torch.float32)
    assert center.item() == 1e6
    assert scale.item() == 1
    assert shift.item() == pytest.approx(-0.03, rel=1e-6)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_constants_are_read_as_they_are_kept_and_computed_with_in_full(backend, kept):
    x, dy = torch.randn(2, 8, 3, 5)
    weight, bias = torch.randn(2, 3)
    mean, var = torch.randn(3).to(kept), (torch.rand(3) + 0.1).to(kept)
    narrow, wide = (
        backend.backward(dy, x, moments, weight, bias, 1e-5, Epilogue(), frozen=True)
        for moments in (
            Moments.constant(mean, var),
            Moments.constant(mean.double(), var.double()),
        )
    )
    for one, other in zip(narrow, wide, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_sums_are_float64_but_where_a_device_has_none():
    assert accumulator(torch.zeros(1)) == torch.float64
    assert accumulator(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_a_backend_is_a_file_with_the_contract_s_names(backend):
    assert isinstance(backend, Backend)
    assert [cpu, gpu, reference] == BACKENDS
    served = torch.zeros(1, 1, 1)
    # interpreted kernels serve nobody who does not ask for them
    assert backend.serves(served, Epilogue()) is (backend is not GPU or HAS_GPU)


def test_the_first_backend_that_serves_is_taken(monkeypatch):
    fast = SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__})
    fast.serves = lambda x, epilogue: x.ndim == 4
    monkeypatch.setattr("batchnorm.kernels.BACKENDS", [fast, reference])
    assert backend_for(torch.zeros(2, 3, 4, 4), Epilogue()) is fast
    assert backend_for(torch.zeros(2, 3), Epilogue()) is reference


@pytest.mark.parametrize("groups", [1, 2])
def test_coefficients_may_lie_in_any_strides_and_dtype(backend, groups):
    x, dy = torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        batch = backend.moments(x, None, groups)
        usual = coefficients_of(x, batch, None, None, 1e-5)
        if groups == 1:
            odd = Coefficients(*(t.repeat_interleave(2)[::2] for t in usual))
        else:
            odd = Coefficients(*(t.t().contiguous().t() for t in usual))
        assert not odd.center.is_contiguous()
        for same in (odd, Coefficients(*(t.double() for t in odd))):
            y = backend.apply(x, same, Epilogue())
            torch.testing.assert_close(y.float(), backend.apply(x, usual, Epilogue()))
            for a, b in zip(
                backend.backward_reduce(dy, x, same, Epilogue())[:2],
                backend.backward_reduce(dy, x, usual, Epilogue())[:2],
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counter", [None, torch.int64, torch.int32])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_any_dtype_are_tracked(backend, dtype, counter, momentum):
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    counters = None if counter is None else torch.zeros(2, dtype=counter)
    batch = Moments.of(torch.randn(3, 50) * 2 + 1, 1)  # whose count is one number, expanded
    share = momentum if momentum is not None else float(counter is not None)
    backend.track(mean, var, None if counters is None else counters[0], batch, momentum)
    near = {"rtol": 0.02, "atol": 0.02} if dtype.itemsize < 4 else {}
    torch.testing.assert_close(mean, (share * batch.mean).to(dtype), **near)
    wanted = 1 + share * (batch.var(unbiased=True) - 1)
    torch.testing.assert_close(var, wanted.to(dtype), **near)
    assert counters is None or counters.tolist() == [1, 0]


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_without_a_variance_is_not_tracked(backend, count):
    mean, var, batches = torch.ones(3), torch.full((3,), 2.0), torch.tensor(7)
    nothing = torch.zeros(3, dtype=torch.float64)
    batch = Moments(torch.full((3,), count), nothing, nothing)
    backend.track(mean, var, batches, batch, 0.1)
    assert (mean.tolist(), var.tolist(), batches.item()) == ([1.0] * 3, [2.0] * 3, 7)

"""What is the GPU backend's own; what all backends share stands in test_kernels.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
import oracle
from batchnorm.kernels import (
    ACTIVATIONS,
    Activation,
    Coefficients,
    Epilogue,
    Sums,
    coefficients_of,
    gpu,
    reference,
)
from batchnorm.kernels.gpu import launcher, library
from batchnorm.kernels.gpu import plan as planning
from batchnorm.kernels.gpu.plan import plan_of, whole_plan_of
from batchnorm.moments import Moments
from devices import HAS_GPU, HAS_KERNELS, on_the_cpu
from processes import in_a_process
from strategies import lay_out

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
backend = on_the_cpu()
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["whole", "split", "several tiles"])
def sharing(request, monkeypatch):
    """Channels in one program, where they fit; split over programs; and of several tiles each."""
    if request.param != "whole":
        monkeypatch.setattr(gpu, "whole_plan_of", lambda plan, operands: None)
    if request.param == "several tiles":
        monkeypatch.setattr(planning, "PROGRAMS", 2)
        monkeypatch.setattr(planning, "SWEEPS", 2)
        monkeypatch.setattr(planning, "TILE", 128)
    plan_of.cache_clear()  # plans hold how many tiles a program has
    yield request.param
    plan_of.cache_clear()


CASES = [  # a shape, groups, a layout
    ((8, 3, 5, 6), 2, "contiguous"),
    ((8, 3, 5, 6), 2, "channels_last"),  # narrow rows, taken together
    ((3, 70, 7, 7), 1, "channels_last"),  # a second block of channels, not full
    ((4, 9, 7, 7), 1, "contiguous"),
    ((6, 3, 150), 3, "contiguous"),  # rows of several pieces
    ((32, 8), 1, "contiguous"),
    ((37, 7), 1, "strided"),
    ((5, 4, 3), 5, "expanded_batch"),
    ((5, 1, 11), 1, "contiguous"),
    ((1, 2, 3, 5, 7), 1, "channels_last"),
    ((40, 16, 4, 4), 1, "channels_last"),
]


def test_programs_have_several_tiles_where_they_should(sharing):
    for shape, _, layout in CASES:
        x = lay_out(torch.empty(shape), layout)
        plan = plan_of(x.shape, x.stride(), 1, 4)
        if sharing == "several tiles" and x.numel() > 4096 and plan is not None:
            assert min(plan.summed, plan.swept, plan.tiles) > 1


@pytest.mark.parametrize(("shape", "groups", "layout"), CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_way_over_a_tensor_gives_what_the_reference_gives(
    sharing, shape, groups, layout, frozen
):
    x, dy, residual = (lay_out(t, layout) for t in torch.randn(3, *shape) * 2 + 3)
    weight, bias = torch.randn(2, shape[1])
    epilogue = Epilogue(residual, None, Activation.of("gelu"))
    with torch.no_grad():
        want, moments = reference.forward(x, weight, bias, 1e-5, epilogue, groups)
        y, batch = backend.forward(x, weight, bias, 1e-5, epilogue, groups)
        known = (dy, x, moments, weight, bias, 1e-5, epilogue)
        wanted = reference.backward(*known, frozen=frozen)
        got = backend.backward(*known, frozen=frozen)
    near = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(y, want, **near)
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(batch.count, moments.count)
    torch.testing.assert_close(batch.mean, moments.mean, rtol=1e-7, atol=1e-7)
    # NumPy, which the interpreter sums with, adds the lanes of a column one after the other
    torch.testing.assert_close(batch.m2, moments.m2, rtol=5e-6, atol=1e-6)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **near)


def test_gradients_that_nobody_asks_for_are_not_computed(sharing):
    x, dy = torch.randn(2, 6, 4, 5)
    weight = torch.randn(4)
    batch = reference.moments(x)
    for frozen in (False, True):
        known = (dy, x, batch, weight, None, 1e-5, Epilogue())
        none = backend.backward(*known, frozen=frozen, affine=False)
        assert none[1:] == (None, None, None)
        one = backend.backward(*known, frozen=frozen)
        assert one.bias is None
        assert torch.equal(one.x, none.x)
        torch.testing.assert_close(one.weight, reference.backward(*known, frozen=frozen).weight)


@pytest.mark.parametrize(
    ("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_residual_may_be_wider_or_narrower_than_the_input(sharing, dtype, other):
    x, dy = torch.randn(2, 4, 3, 5).to(dtype)
    epilogue = Epilogue(torch.randn(4, 3, 5).to(other), None, Activation.of("relu"))
    with torch.no_grad():
        y, batch = backend.forward(x, None, None, 1e-5, epilogue)
        want, _ = reference.forward(x, None, None, 1e-5, epilogue)
        got = backend.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
        wanted = reference.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    near = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.x, wanted.x, **near)
    torch.testing.assert_close(got.residual, wanted.residual, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        ((20, 9), lambda t: t[:, :8]),  # rows with gaps, of a length that is a multiple of eight
        ((3, 4, 6, 9), lambda t: t[..., :8]),
        ((6, 9, 4), lambda t: t[:, 1:]),
    ],
)
def test_tensors_with_gaps_beside_tensors_without(sharing, whole, cut):
    gaps = [cut(torch.randn(whole)) for _ in range(3)]
    dense = [t.contiguous() for t in gaps]
    for x, dy, residual in (
        gaps, [gaps[0], *dense[1:]], [dense[0], gaps[1], dense[2]], [*dense[:2], gaps[2]]
    ):  # fmt: skip
        epilogue = Epilogue(residual, None, Activation.of("relu"))
        with torch.no_grad():
            y, batch = backend.forward(x, None, None, 1e-5, epilogue)
            want, _ = reference.forward(x, None, None, 1e-5, epilogue)
            got = backend.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
            wanted = reference.backward(dy, x, batch, None, None, 1e-5, epilogue, frozen=False)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.x, wanted.x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.residual, wanted.residual)


def test_what_rounding_the_mean_lost_comes_back_in_the_gradients(sharing):
    x = torch.randn(400, 3) * 0.01 + 1000.003  # of which float32 rounds a tenth of a deviation off
    dy, weight, bias = torch.randn(400, 3), torch.randn(3), torch.randn(3)
    want = oracle.batch_norm(x, dy, weight, bias)
    with torch.no_grad():
        y, batch = backend.forward(x, weight, bias, 1e-5, Epilogue())
        got = backend.backward(dy, x, batch, weight, bias, 1e-5, Epilogue(), frozen=False)
    for mine, value in zip((y, got.x, got.weight), (want.y, want.dx, want.d_weight), strict=True):
        np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_known_moments_give_the_same_bits_again(sharing, dtype, act):
    """What `rematerialize` computes again must be what was."""
    x = lay_out(torch.randn(6, 5, 4, 4) + 2, "channels_last").to(dtype)
    weight, bias = torch.randn(2, 5)
    epilogue = Epilogue(torch.randn_like(x), None, Activation.of(act))
    y, batch = backend.forward(x, weight, bias, 1e-5, epilogue)
    again, same = backend.forward(x, weight, bias, 1e-5, epilogue, 1, batch)
    assert torch.equal(y, again)
    assert torch.equal(same.mean, batch.mean)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_ranks_halves_make_one_process_s_gradient(layout):
    x, dy, residual = (lay_out(t, layout) for t in torch.randn(3, 10, 6, 5, 5) + 1)
    weight, bias = torch.randn(2, 6)
    act = Activation.of("relu")
    whole = Epilogue(residual, None, act)
    y, batch = backend.forward(x, weight, bias, 1e-5, whole)
    want = backend.backward(dy, x, batch, weight, bias, 1e-5, whole, frozen=False)

    ranks = [slice(0, 3), slice(3, 10)]
    pooled = Moments.merge(backend.moments(x[rank]) for rank in ranks)
    numbers = coefficients_of(x, pooled, weight, bias, 1e-5)
    halves = []
    for rank in ranks:
        epilogue = Epilogue(residual[rank], None, act)
        torch.testing.assert_close(backend.apply(x[rank], numbers, epilogue), y[rank])
        halves.append(backend.backward_reduce(dy[rank], x[rank], numbers, epilogue))
    total, about_center = (sum(half[i] for half in halves) for i in (0, 1))
    sums = Sums.of(total, about_center, numbers, pooled)
    line = sums.slope_and_offset(numbers, pooled, 1e-5)
    for rank, (_, _, g) in zip(ranks, halves, strict=True):
        dx = backend.backward_apply(g, x[rank], numbers, Epilogue(), *line)
        torch.testing.assert_close(dx, want.x[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(g, want.residual[rank])
    torch.testing.assert_close(sums.weight_gradient(pooled, 1e-5).float(), want.weight)
    torch.testing.assert_close(total.float(), want.bias)


def test_a_first_tile_far_from_the_rest_costs_few_digits(monkeypatch):
    """Deviations are taken from the first tile's mean; here it is 10,000 deviations off."""
    monkeypatch.setattr(planning, "PROGRAMS", 1)
    x = torch.randn(36_000, 2) * 0.3 + 3000
    plan_of.cache_clear()
    plan = plan_of(x.shape, x.stride(), 1, 4)
    assert plan.summed == plan.tiles > 30
    x[: plan.tile.lanes * plan.repeat] = 0
    batch = backend.moments(x)
    plan_of.cache_clear()
    want = x.double().var(0, correction=0)
    torch.testing.assert_close(batch.var(), want, rtol=plan.tiles * 2**-22, atol=0)
    assert batch.mean.sub(x.double().mean(0)).abs().max() < 1e-6 * want.sqrt().min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e13, 3e17, 1e30])
def test_values_whose_squares_overflow_float32(sharing, dtype, spread):
    x = (torch.randn(300, 3) * spread).to(dtype)
    dy = torch.randn(300, 3).to(dtype)
    want = oracle.batch_norm(x.float(), dy.float())
    with torch.no_grad():
        y, batch = backend.forward(x, None, None, 1e-5, Epilogue())
        got = backend.backward(dy, x, batch, None, None, 1e-5, Epilogue(), frozen=False)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(batch.var(), want.var, rtol=1e-5)
    np.testing.assert_allclose(y.float(), want.y, rtol=near, atol=near)
    np.testing.assert_allclose(got.x.float() * spread, want.dx * spread, rtol=near, atol=4 * near)


@pytest.mark.parametrize("spoiled", [None, 0, 1499])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_one_channel_of_many_that_is_not_finite_keeps_all_as_they_were(spoiled, momentum):
    channels = 1500  # more than the program has at a time
    counts = torch.full((channels,), 20)
    batch = Moments(counts, torch.randn(channels).double(), torch.rand(channels).double() * 19)
    if spoiled is not None:
        batch.m2[spoiled] = torch.nan
    mine = [torch.zeros(channels), torch.ones(channels), torch.tensor(3)]
    theirs = [t.clone() for t in mine]
    backend.track(*mine, batch, momentum)
    reference.track(*theirs, batch, momentum)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert mine[2].item() == (3 if spoiled is not None else 4)


def test_autograd_sees_that_the_counter_moved():
    batches = torch.tensor(3)
    batch = reference.moments(torch.randn(5, 3))
    gpu_track = on_the_cpu().track
    before = batches._version
    gpu_track(torch.zeros(3), torch.ones(3), batches, batch, 0.1)
    assert batches._version > before


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_over_all_magnitudes(name):
    z = torch.cat([torch.logspace(-12, 2.3, 401), torch.linspace(-12, 12, 401)])
    z = torch.cat([z, -z])[:, None]
    dy, act = torch.full_like(z, 1.5), Activation.of(name)
    one, zero = torch.ones(1), torch.zeros(1)
    coefficients = Coefficients(zero, one, zero)
    y = backend.apply(z, coefficients, Epilogue(act=act))
    dx = backend.backward_apply(dy, z, coefficients, Epilogue(act=act), zero, zero)
    exact = z.double()
    ulp = torch.finfo(torch.float32).eps
    want = act(exact)
    if name == "gelu_tanh":  # PyTorch's own loses its negative tail; this form of it does not
        want = exact * torch.sigmoid((8 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    # an exponential magnifies the rounding of its argument; gelu's tail is that of 1 + erf
    tail = ulp * exact.abs() if name == "gelu" else torch.tensor(1e-37)
    near = ulp * (8 + exact.abs().pow(3 if name == "gelu_tanh" else 1)) * want.abs()
    assert ((y - want).abs() <= near + tail).all()
    with torch.no_grad():
        slope = act.backward(dy.double(), exact)
    torch.testing.assert_close(dx.double(), slope, rtol=16 * ulp, atol=16 * ulp)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_activations_of_what_is_no_finite_number(name, dtype):
    z = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [0.0], [-0.0]], dtype=dtype)
    one, zero = torch.ones(1), torch.zeros(1)
    y = backend.apply(z, Coefficients(zero, one, zero), Epilogue(act=Activation.of(name)))
    want = Activation.of(name)(z.double())
    assert y[0].isnan()
    assert y[1] == want[1]
    assert y[3] == want[3]
    if not want[2].isnan():  # PyTorch has -inf · 0 for some limits
        assert y[2] == want[2]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "offset"),
    [((16, 16, 8, 8), 0.0), ((2, 3), 0.0), ((16, 3, 17), 5.0), ((4000, 3), 3000.0)],
)
def test_errors_are_no_larger_than_those_of_torch(shape, offset, layout, frozen):
    x = lay_out(torch.randn(shape) + offset, layout).requires_grad_()
    dy, c = lay_out(torch.randn(shape), layout), shape[1]
    weight, bias = torch.randn(2, c).requires_grad_().unbind()
    statistics = (torch.randn(c) + offset, torch.rand(c) + 0.5) if frozen else None
    exact = [t.detach().double() for t in (x, dy, weight, bias)]
    want = oracle.batch_norm(*exact, frozen=statistics)
    theirs = F.batch_norm(x, *(statistics or (None, None)), weight, bias, training=not frozen)
    d_theirs = torch.autograd.grad(theirs, (x, weight, bias), dy)
    given = None if statistics is None else Moments.constant(*statistics)
    with torch.no_grad():
        y, batch = backend.forward(x, weight, bias, 1e-5, Epilogue(), given=given)
        ours = backend.backward(dy, x, batch, weight, bias, 1e-5, Epilogue(), frozen=frozen)
    wanted = (want.y, want.dx, want.d_weight, want.d_bias)
    for mine, other, value in zip(
        (y, ours.x, ours.weight, ours.bias), (theirs, *d_theirs), wanted, strict=True
    ):
        error, theirs_error = (
            np.sqrt(np.mean(np.square(t.detach().double().numpy() - value))) for t in (mine, other)
        )
        # torch's CPU has float64 sums and exact roots; a GPU's root is off by a last bit
        assert error <= theirs_error * 1.2 + 2 * np.sqrt(np.mean(np.square(value))) * 2**-23


@pytest.mark.as_installed
def test_whole_numbers_come_to_the_kernels_as_fractions(monkeypatch):
    taken = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: taken.update(arguments)

    monkeypatch.setattr(launcher, "kernel", lambda name: Kernel())
    act = Activation("leaky_relu", 1)
    backend.forward(torch.ones(4, 3), None, None, 1, Epilogue(act=act))
    backend.track(torch.ones(3), torch.ones(3), None, reference.moments(torch.ones(4, 3)), 1)
    for name in ("eps", "parameter", "share"):  # of 1 Triton would make a constant
        assert type(taken[name]) is float


def test_nothing_waits_for_the_device_or_allocates_but_results_and_parts(sharing, monkeypatch):
    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), others=None):
            heard.append(function.name())
            return function(*arguments, **(others or {}))

    heard, launched = [], []
    monkeypatch.setattr(gpu, "launch", lambda name, *_, **__: launched.append(name))
    x, dy, residual = (lay_out(t, "channels_last") for t in torch.randn(3, 8, 4, 5, 5))
    weight, bias = torch.randn(2, 4)
    epilogue = Epilogue(residual, None, Activation.of("relu"))
    with torch.no_grad(), Heard():
        _, batch = gpu.forward(x, weight, bias, 1e-5, epilogue)
        gpu.backward(dy, x, batch, weight, bias, 1e-5, epilogue, frozen=False)
        gpu.track(weight, bias, torch.tensor(0), batch, 0.1)
    assert set(heard) <= {"aten::new_empty", "aten::empty_like", "aten::unbind.int"} | {
        "aten::empty.memory_format", "aten::fill_.Scalar", "aten::lift_fresh", "aten::detach",
        "aten::promote_types", "aten::to.dtype",
    }  # fmt: skip
    forward = ["whole_forward"] if sharing == "whole" else ["partial_moments", "merge_moments"]
    backward = ["whole_backward"]
    if sharing != "whole":
        forward += ["apply"]
        backward = ["partial_sums", "merge_sums", "input_gradient"]
    assert launched == [*forward, *backward, "track"]


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 150),
    st.lists(st.integers(1, 80), max_size=2), st.booleans(), st.sampled_from([2, 4]),
)  # fmt: skip
@settings(max_examples=150)
def test_tiles_cover_every_value_once(groups, samples, channels, positions, last, itemsize):
    shape = (groups * samples, channels, *positions)
    x = lay_out(torch.empty(shape, device="meta"), "channels_last" if last else "contiguous")
    split = plan_of(shape, x.stride(), groups, itemsize)
    wholes = [whole_plan_of(split, operands) for operands in (1, 2)]
    for plan in [split, *wholes]:
        if plan is None:
            continue
        assert plan.tile.size & (plan.tile.size - 1) == 0
        assert 1 <= plan.tile.warps <= 16
        assert 1 <= plan.summed <= planning.LONGEST_SUM
        assert plan.rows * plan.width * (1 if plan.channels_last else channels) * groups == (
            x.numel()
        )
        tile, lane = np.meshgrid(np.arange(plan.tiles), np.arange(plan.tile.lanes), indexing="ij")
        if plan.channels_last:
            rows = (tile * plan.tile.lanes + lane).ravel()
            places = np.arange(plan.blocks * plan.tile.columns)
        else:
            piece = plan.tile.piece
            pieces = -(-plan.length // piece)
            row = tile // pieces * (plan.tile.lanes // piece) + lane // piece
            within = tile % pieces * piece + lane % piece
            rows = (row * plan.length + within)[within < plan.length].ravel()
            places = np.arange(plan.blocks * plan.tile.columns)
            assert plan.blocks * plan.tile.columns == channels
        limit = plan.rows if plan.channels_last else plan.rows * plan.length
        assert np.array_equal(np.sort(rows[rows < limit]), np.arange(limit))
        assert len(places) >= plan.columns > len(places) - plan.tile.columns
    for whole in wholes:
        assert whole is None or (whole.tiles == 1 and whole.repeat == 1)


def test_few_channels_of_many_positions_fill_a_large_gpu():
    """One program a channel was 25 times slower than PyTorch in a peer (attorch#7)."""
    for shape, last in [
        ((32, 128, 16384), False), ((256, 3, 224, 224), True), ((256, 64, 112, 112), True),
        ((1, 1, 4096, 4096), False), ((1_000_000, 4), True),
    ]:  # fmt: skip
        x = lay_out(torch.empty(shape, device="meta"), "channels_last" if last else "contiguous")
        plan = plan_of(shape, x.stride(), 1, 2)
        programs = plan.blocks * -(-plan.tiles // plan.summed)
        assert whole_plan_of(plan, 1) is None
        assert programs >= 500  # an H200 has 132 processors of four programs each
        entries = -(-plan.tiles // plan.summed) * plan.repeat
        assert entries <= 21 * max(gpu.MERGED)  # of which one program merges so many at a time


def test_what_it_serves_and_what_it_leaves_to_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "switched_to", lambda: "interpreter")
    x = torch.zeros(4, 3, 5)
    for dtype in (torch.float32, *HALVES):
        assert gpu.serves(x.to(dtype), Epilogue())
        assert gpu.serves(x.to(dtype), Epilogue(residual=x))
        assert not gpu.serves(x.to(dtype), Epilogue(mask=torch.ones(4, 1, 5, dtype=torch.bool)))
    assert not gpu.serves(x.double(), Epilogue())
    assert not gpu.serves(x, Epilogue(residual=x.double()))
    assert not gpu.serves(x[:0], Epilogue())
    assert not gpu.serves(torch.zeros(4, 3, dtype=torch.complex64).conj().imag, Epilogue())
    assert not gpu.serves(torch.zeros(4, 3, device="meta"), Epilogue())
    assert gpu.serves(torch.zeros(1).expand(2**30, 2, 1), Epilogue())
    assert not gpu.serves(torch.zeros(1).expand(2**30, 2, 2), Epilogue())
    monkeypatch.undo()
    assert not gpu.serves(x, Epilogue())


def test_a_gpu_that_triton_does_not_support_has_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    library.reason_without_on.cache_clear()
    want = "its compute capability is 7.5, and Triton needs 8.0"
    assert library.reason_without_on(torch.device("cuda:0")) == want
    library.reason_without_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert library.reason_without_on(torch.device("cuda:0")) is None
    library.reason_without_on.cache_clear()


@pytest.mark.parametrize(
    ("before", "variables", "reason"),
    [
        ("", {"BATCHNORM_KERNELS": "reference"}, "switched off by BATCHNORM_KERNELS=reference"),
        ("import sys; sys.modules['triton'] = None", {}, "Triton is not installed"),
        ("import sys; sys.modules['triton._C'] = None", {}, "Triton cannot be imported: "),
        ("import triton; triton.__version__ = '3.1.0'", {}, "Triton 3.1.0 is older than 3.2"),
    ],
)
def test_why_there_are_no_kernels(before, variables, reason):
    code = f"{before}\nfrom batchnorm.kernels import gpu; print(gpu.reason_without())"
    assert in_a_process(code, **variables).startswith(reason)


@pytest.mark.parametrize("before", ["import triton", "import os; del os.environ[VARIABLE]"])
def test_an_interpreter_that_is_asked_for_too_late_is_an_error(before):
    code = f"""
VARIABLE = "BATCHNORM_KERNELS"
{before}
import os, torch, batchnorm
os.environ[VARIABLE] = "interpreter"
try:
    batchnorm.BatchNorm1d(3)(torch.randn(8, 3))
except RuntimeError as error:
    print(error)
"""
    said = in_a_process(code, BATCHNORM_KERNELS="interpreter", TRITON_INTERPRET="0")
    assert said.startswith("BATCHNORM_KERNELS=interpreter came too late: it must be set before")


def test_importing_the_library_does_not_import_triton():
    code = "import sys, batchnorm, batchnorm.cli; print('triton' in sys.modules)"
    assert in_a_process(code) == "False"


LAYERS = """
import torch, batchnorm
from batchnorm.kernels import Epilogue, backend_for, gpu

torch.manual_seed(0)
ours = batchnorm.BatchNorm2d(6, act="relu")
theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(6), torch.nn.ReLU())
run = torch.compile(ours, fullgraph=True, backend="aot_eager") if COMPILED else ours
for training in (True, True, False):
    ours.train(training), theirs.train(training)
    x = torch.randn(5, 6, 4, 4).to(memory_format=torch.channels_last)
    assert backend_for(x, Epilogue()) is gpu
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = run(mine), theirs(other)
    assert y.stride() == want.stride()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.square().sum().backward(), want.square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-4)
torch.testing.assert_close(ours.weight.grad, theirs[0].weight.grad, rtol=1e-5, atol=1e-4)
for name, buffer in ours.named_buffers():
    torch.testing.assert_close(buffer, theirs[0].get_buffer(name))
print("agree")
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_run_on_these_kernels(compiled):
    code = f"COMPILED = {compiled}\n{LAYERS}"
    assert in_a_process(code, BATCHNORM_KERNELS="interpreter") == "agree"


ABSENT = [  # see compiled_for_gpus.py
    ((32, 64, 56, 56), "channels_last", "bfloat16", "relu", True, False),
    ((32, 2048, 7, 7), "channels_last", "bfloat16", "relu", False, False),
    ((32, 2048, 7, 7), "channels_last", "bfloat16", "gelu", True, False),
    ((16, 1024, 7, 7), "channels_last", "bfloat16", "gelu", True, False),
    ((32, 48, 28, 28), "contiguous", "float16", "gelu", False, False),
    ((1000, 3), "contiguous", "float32", "tanh", True, True),
]


@pytest.mark.parametrize(("maker", "arch"), [("cuda", "90"), ("cuda", "80"), ("hip", "gfx942")])
def test_triton_s_compiler_takes_the_kernels(tmp_path, maker, arch):
    script = Path(__file__).with_name("compiled_for_gpus.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, maker, arch, json.dumps(ABSENT)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in made}
    assert names == set(library.HOMES)
    if maker == "cuda":
        assert all(kernel["spilled"] <= 16 for kernel in made)  # bytes a thread
        assert not any(kernel["contracts"] for kernel in made)
        for kernel in made[:6]:  # the first case's: large, channels last
            if "merge" not in kernel["kernel"]:
                # all in sixteen bytes but what a program leaves in the end
                assert kernel["accesses"]["16"] >= 4
                assert sum(kernel["accesses"].values()) - kernel["accesses"]["16"] <= 5
        assert all(kernel["waits"] for kernel in made if kernel["kernel"] == "track")


def test_the_device_of_the_tensors_is_made_the_current_one(monkeypatch):
    current, launched = [0], []

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: launched.append(current[-1])

    monkeypatch.setattr(launcher, "kernel", lambda name: Kernel())
    monkeypatch.setattr(launcher, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    for index in (0, 1):
        launcher.launch("track", 1, torch.device("cuda", index))
    assert launched == [0, 1]
    assert current == [0]


@needs_gpu
def test_a_graph_of_a_gpu_holds_a_whole_training_step():
    layer = batchnorm.BatchNorm2d(64, act="relu", device="cuda")
    x = torch.randn(8, 64, 20, 20, device="cuda").to(memory_format=torch.channels_last)
    x.requires_grad_()

    def step():
        return torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = layer.num_batches_tracked.item()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for value, want in zip(captured, step(), strict=True):
        assert torch.equal(value, want)
    assert layer.num_batches_tracked.item() == seen + 2


@needs_gpu
def test_more_values_than_32_bits_count():
    x = torch.randn(3, 2, 2**29 + 8, dtype=torch.bfloat16, device="cuda")
    y, batch = gpu.forward(x, None, None, 1e-5, Epilogue())
    sums = y[-1, -1, -1000:].float(), x[-1, -1, -1000:].float()
    torch.testing.assert_close(*sums, rtol=2e-2, atol=2e-2)  # a standard normal already
    assert batch.count.tolist() == [3 * (2**29 + 8)] * 2

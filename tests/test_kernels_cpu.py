"""What is the compiled CPU backend's own; what all backends share stands in test_kernels.py."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import oracle
from batchnorm.kernels import ACTIVATIONS, Activation, Epilogue, backend_for, cpu, reference
from batchnorm.kernels.cpu import plan as planning
from batchnorm.kernels.cpu.plan import plan_of
from batchnorm.kernels.layout import layout_of
from batchnorm.moments import Moments
from processes import in_a_process
from strategies import lay_out

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


FORWARD = """
import torch
from batchnorm.kernels import Epilogue, backend_for, cpu
x = torch.arange(24 * 70 * 70, dtype=torch.float64).sin().view(8, 3, 70, 70)
assert backend_for(x, Epilogue()) is cpu
y, _ = cpu.forward(x, None, None, 1e-5, Epilogue())
want = torch.nn.functional.batch_norm(x, None, None, training=True)
torch.testing.assert_close(y, want)
"""


def test_what_it_serves_and_what_it_leaves_to_the_reference():
    x = torch.zeros(4, 3, 5)
    mask = torch.ones(4, 1, 5, dtype=torch.bool)
    for dtype in DTYPES:
        assert backend_for(x.to(dtype), Epilogue()) is cpu
        assert backend_for(x.to(dtype), Epilogue(mask=mask)) is reference
    assert backend_for(x.half(), Epilogue()) is reference
    assert backend_for(x[:0], Epilogue()) is reference
    assert backend_for(x, Epilogue(residual=x.double())) is reference
    assert (
        backend_for(torch.zeros(4, 3, dtype=torch.complex64).conj().imag, Epilogue()) is reference
    )
    assert backend_for(torch.zeros(4, 3, device="meta"), Epilogue()) is reference


def test_importing_the_library_does_not_import_numba():
    code = "import sys, batchnorm, batchnorm.cli; print('numba' in sys.modules)"
    assert in_a_process(code) == "False"


@pytest.mark.parametrize(
    ("before", "variables", "reason"),
    [
        ("", {"BATCHNORM_KERNELS": "reference"}, "switched off by BATCHNORM_KERNELS=reference"),
        ("import sys; sys.modules['numba'] = None", {}, "Numba is not installed"),
        ("import sys; sys.modules['llvmlite'] = None", {}, "Numba cannot be imported: "),
    ],
)
def test_without_numba_the_layers_run_on_the_reference(before, variables, reason):
    code = f"""
{before}
import torch, batchnorm
from batchnorm.kernels import Epilogue, backend_for, cpu, reference
layer = batchnorm.BatchNorm1d(3, act="relu")
layer(torch.randn(8, 3)).sum().backward()
assert backend_for(torch.randn(8, 3), Epilogue()) is reference
print(cpu.reason_without())
"""
    assert in_a_process(code, **variables).startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_over_all_magnitudes(name, dtype):
    z = torch.cat([torch.logspace(-12, 2.3, 4001), torch.linspace(-12, 12, 4001)]).double()
    z = torch.cat([z, -z]).to(dtype)[:, None]
    dy = torch.full_like(z, 1.5)
    act = Activation.of(name)
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    coefficients = cpu.Coefficients(zero, one, zero)
    y = cpu.apply(z, coefficients, Epilogue(act=act))
    dx = cpu.backward_apply(dy, z, coefficients, Epilogue(act=act), zero, zero)
    exact = z.double()
    if name == "gelu":  # PyTorch's own loses its negative tail; these forms of it do not
        want = exact * torch.special.erfc(-exact * 0.5**0.5) / 2
    elif name == "gelu_tanh":
        want = exact * torch.sigmoid((8 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    else:
        want = act(exact)
    ulp = torch.finfo(dtype).eps
    tiny = {torch.float32: 1e-40, torch.float64: 1e-300}[dtype]
    # an exponential magnifies the rounding of its argument; float32's arguments are float64
    near = 4 * ulp if dtype == torch.float32 else 64 * ulp
    torch.testing.assert_close(y.double(), want, rtol=near, atol=tiny + 1e-9 * ulp)
    with torch.no_grad():
        slope = act.backward(dy.double(), exact)
    torch.testing.assert_close(dx.double(), slope, rtol=2 * near, atol=2 * near)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_what_is_no_finite_number(name, dtype):
    z = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [0.0], [-0.0]], dtype=dtype)
    one, zero = torch.ones(1), torch.zeros(1)
    if dtype == torch.float64:
        one, zero = one.double(), zero.double()
    y = cpu.apply(z, cpu.Coefficients(zero, one, zero), Epilogue(act=Activation.of(name)))
    want = Activation.of(name)(z.double())
    assert y[0].isnan()
    assert y[1] == want[1]
    assert y[3] == want[3]
    if not want[2].isnan():  # PyTorch has -inf · 0 for some limits
        assert y[2] == want[2]


def test_every_bfloat16_comes_through_and_is_rounded_to_even():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    one, zero = torch.ones(1), torch.zeros(1)
    same = cpu.apply(x, cpu.Coefficients(zero, one, zero), Epilogue())
    assert torch.equal(same.isnan(), x.isnan())
    assert torch.equal(same[~x.isnan()], x[~x.isnan()])
    scale = torch.full((1,), 1.00390625 + 2**-9)  # makes halves of a last bit, which tie
    y = cpu.apply(x, cpu.Coefficients(zero, scale, zero), Epilogue())
    want = (x.float() * scale).bfloat16()
    assert torch.equal(y[~x.isnan()], want[~x.isnan()])


CASES = [
    ((16, 16, 8, 8), 0.0),
    ((2, 3), 0.0),  # two values: the gradient cancels
    ((64, 3, 17), 5.0),
    ((32, 8, 30, 30), 100.0),
    ((20_000, 3), 3000.0),
    ((8, 300, 7, 7), 1.0),
    ((4, 2, 90, 100), 0.0),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "offset"), CASES)
def test_errors_are_no_larger_than_those_of_torch(shape, offset, layout, dtype, frozen):
    x = lay_out((torch.randn(shape) + offset).to(dtype), layout).requires_grad_()
    dy, c = lay_out(torch.randn(shape).to(dtype), layout), shape[1]
    weight, bias = torch.randn(2, c).requires_grad_().unbind()
    statistics = (torch.randn(c) + offset, torch.rand(c) + 0.5) if frozen else None
    exact = [t.detach().double() for t in (x, dy, weight, bias)]
    want = oracle.batch_norm(*exact, frozen=statistics)
    theirs = F.batch_norm(x, *(statistics or (None, None)), weight, bias, training=not frozen)
    d_theirs = torch.autograd.grad(theirs, (x, weight, bias), dy)
    given = None
    if statistics is not None:
        given = Moments.constant(*(s.double() for s in statistics))
    with torch.no_grad():
        y, batch = cpu.forward(x, weight, bias, 1e-5, Epilogue(), given=given)
        ours = cpu.backward(dy, x, batch, weight, bias, 1e-5, Epilogue(), frozen=frozen)

    def errors(value, exact):
        difference = np.abs(value.detach().double().numpy() - exact)
        return np.sqrt(np.mean(difference**2)), difference.max()

    wanted = (want.y, want.dx, want.d_weight, want.d_bias)
    for mine, other, exact in zip(
        (y, ours.x, ours.weight, ours.bias), (theirs, *d_theirs), wanted, strict=True
    ):
        (mean, worst), (their_mean, their_worst) = errors(mine, exact), errors(other, exact)
        half_ulp = torch.finfo(mine.dtype).eps / 2  # a value's own rounding, once
        assert mean <= their_mean * 1.05 + np.sqrt(np.mean(np.square(exact))) * 2**-24
        assert worst <= their_worst * 1.05 + np.abs(exact).max() * half_ulp


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 3000),
    st.lists(st.integers(1, 300), max_size=2), st.booleans(), st.sampled_from([2, 4, 8]),
    st.booleans(),
)  # fmt: skip
def test_tasks_cover_every_value_once(groups, samples, channels, positions, last, itemsize, once):
    shape = (groups * samples, channels, *positions)
    strides = torch.empty(shape, device="meta").stride()
    if last and positions:
        order = (0, *range(2, len(shape)), 1)
        made = torch.empty([shape[d] for d in order], device="meta")
        strides = made.movedim(-1, 1).stride()
    plan = plan_of(shape, strides, groups, itemsize, once)
    assert plan is not None
    assert (plan.blocks - 1) * plan.block < channels <= plan.blocks * plan.block
    assert 1 <= plan.segments <= plan.units
    assert plan.tasks == groups * plan.blocks * plan.segments
    assert plan.pitch <= planning.LARGEST_PITCH
    assert (plan.pieces - 1) * plan.piece < plan.length <= plan.pieces * plan.piece
    assert plan.samples * plan.length == plan.count == samples * int(np.prod(positions))
    assert plan.units == plan.samples * plan.pieces


@pytest.mark.parametrize(
    ("shape", "stride", "channels_last"),
    [
        ((4, 3, 5, 6), (90, 30, 6, 1), False),
        ((4, 3, 5, 6), (90, 1, 18, 3), True),
        ((4, 3), (3, 1), True),
        ((4, 3), (8, 1), True),  # some columns of a wider matrix
        ((4, 3, 5), (50, 5, 1), False),  # some channels of more
        ((4, 3, 5), (0, 5, 1), False),  # one sample, seen four times
        ((4, 1, 5), (5, 77, 1), False),
    ],
)
def test_layouts_that_are_walked_as_they_are(shape, stride, channels_last):
    layout = layout_of(shape, stride)
    assert layout is not None
    assert layout.channels_last is channels_last


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 3), (1, 4)), ((4, 3, 5), (15, 5, 0)), ((4, 3, 5, 6), (90, 30, 1, 5))]
)
def test_layouts_that_are_copied_first(shape, stride):
    assert layout_of(shape, stride) is None
    assert plan_of(shape, stride, 1, 4, False) is None


def test_a_value_of_the_switch_that_there_is_not_is_an_error():
    code = """
import torch, batchnorm
try:
    batchnorm.BatchNorm1d(3)(torch.randn(8, 3))
except ValueError as error:
    print(error)
"""
    want = "BATCHNORM_KERNELS must be reference, interpreter or not set, got 'numba'"
    assert in_a_process(code, BATCHNORM_KERNELS="numba") == want


def test_one_openmp_and_no_more_threads_than_pytorch_allows():
    code = """
import os, torch
from batchnorm.kernels import Epilogue, cpu
x = torch.randn(64, 32, 56, 56)

def work():
    _, batch = cpu.forward(x, None, None, 1e-5, Epilogue())
    cpu.backward(x, x, batch, None, None, 1e-5, Epilogue(), frozen=False)
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
alone = work()  # the compiler's own included
torch.set_num_threads(2)
torch.randn(3000, 3000).exp_()  # starts PyTorch's team
assert len(os.listdir("/proc/self/task")) == alone + 1
assert work() == alone + 1
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1]}
print(len([path for path in loaded if "gomp" in path or "libomp" in path or "libiomp" in path]))
"""
    assert in_a_process(code) == "1"


def test_a_forked_child_computes_the_same():
    code = (
        FORWARD
        + """
import os, sys
bits = y.numpy().tobytes()
child = os.fork()
if child == 0:
    again, _ = cpu.forward(x, None, None, 1e-5, Epilogue())
    os._exit(0 if again.numpy().tobytes() == bits else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
    )
    # a child of a process with threads may hang in what it shares with them; Python says so
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + code
    assert in_a_process(code) == "0"


def test_two_processes_compile_at_once_and_a_third_finds_their_work(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", FORWARD], env=environment)
        for _ in range(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    compiled = sorted(tmp_path.rglob("*.nbc"))
    assert len(compiled) == 1
    written = compiled[0].stat().st_mtime_ns
    in_a_process(FORWARD, NUMBA_CACHE_DIR=str(tmp_path))
    assert sorted(tmp_path.rglob("*.nbc")) == compiled
    assert compiled[0].stat().st_mtime_ns == written


def test_where_nothing_can_be_written_kernels_are_compiled_for_the_process(tmp_path):
    # no directory can be made below a file, and no other place is to be tried
    (tmp_path / "file").write_text("")
    code = FORWARD + "from batchnorm.kernels.cpu import library; print(library.cache_folder())"
    places = {
        "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    assert in_a_process(code, **places) == "None"

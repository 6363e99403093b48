import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from batchnorm import Batch, Ghost, Moments, Ramp, Renorm, Running
from batchnorm.functional import batch_norm
from batchnorm.statistics import RunningStatistics


def running(c=3, dtype=torch.float64, batches=0):
    mean, var = torch.randn(c, dtype=dtype), torch.rand(c, dtype=dtype) + 0.5
    return RunningStatistics(mean, var, torch.tensor(batches))


def test_batch_is_batch_norm():
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(3), torch.randn(3)
    y, batch = Batch().normalize(x, weight, bias, None, act="relu")
    want, moments = batch_norm(x, weight, bias, act="relu")
    assert torch.equal(y, want)
    assert torch.equal(batch.m2, moments.m2)


def test_running_uses_the_buffers_and_gives_nothing_to_track():
    x, weight = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    r = running()
    y, batch = Running().normalize(x, weight, None, r, eps=1e-3)
    want = oracle.batch_norm(x, x, weight, eps=1e-3, frozen=(r.mean, r.var))
    np.testing.assert_allclose(y, want.y, rtol=1e-12, atol=1e-12)
    assert batch is None
    assert Running().smallest_slice(1) == 0


@given(st.integers(2, 5), st.integers(0, 12), st.booleans(), st.booleans())
def test_ghost_normalizes_each_slice_alone(size, n, with_residual, with_mask):
    x = torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(n, 3, 4, dtype=torch.float64)
    residual = torch.randn(n, 3, 4, dtype=torch.float64) if with_residual else None
    mask = torch.rand(n, 4) < 0.8 if with_mask else None
    options = {"residual": residual, "mask": mask, "act": "silu"}
    y, pooled = Ghost(size).normalize(x, weight, None, None, **options)

    slices = []
    for i in range(0, n, size):
        own = {k: None if v is None else v[i : i + size] for k, v in options.items() if k != "act"}
        slices.append(batch_norm(x[i : i + size], weight, act="silu", **own))
    if not slices:
        assert y.shape == x.shape
        return
    want = torch.cat([part for part, _ in slices])
    torch.testing.assert_close(y, want)
    whole = Moments.merge([m for _, m in slices])
    assert pooled.count.tolist() == whole.count.tolist()
    torch.testing.assert_close(pooled.mean, whole.mean)
    torch.testing.assert_close(pooled.m2, whole.m2)
    for got, expected in zip(
        torch.autograd.grad(y, (x, weight), dy),
        torch.autograd.grad(want, (x, weight), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_ghost_says_how_small_its_last_slice_is():
    assert [Ghost(4).smallest_slice(n) for n in (0, 1, 3, 4, 5, 8, 11)] == [0, 1, 3, 4, 1, 4, 3]


def test_ghost_keeps_channels_last():
    x = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last)
    y, _ = Ghost(2).normalize(x, None, None, None)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_ghost_needs_two(size):
    with pytest.raises(ValueError, match=f"at least 2 samples in a slice, got {size}"):
        Ghost(size)


def renorm_oracle(x, r, weight, bias, r_max, d_max, eps):
    """Ioffe 2017, algorithm 1."""
    mean, var = x.mean(axis=(0, 2)), x.var(axis=(0, 2))
    sigma, running_sigma = np.sqrt(var + eps), np.sqrt(r.var.numpy() + eps)
    rr = np.clip(sigma / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean - r.mean.numpy()) / running_sigma, -d_max, d_max)
    shape = (1, -1, 1)
    normalized = (x - mean.reshape(shape)) / sigma.reshape(shape)
    y = normalized * rr.reshape(shape) + d.reshape(shape)
    return y * weight.numpy().reshape(shape) + bias.numpy().reshape(shape), rr, d


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.3), (1e9, 1e9)])
def test_renorm_agrees_with_the_paper_s_algorithm(r_max, d_max):
    x = torch.randn(6, 3, 4, dtype=torch.float64) * 2 + 1
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    r = running()
    y, batch = Renorm(r_max, d_max).normalize(x, weight, bias, r, eps=1e-3)
    want, _, _ = renorm_oracle(x.numpy(), r, weight, bias, r_max, d_max, 1e-3)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(batch.mean, x.mean((0, 2)), rtol=1e-12)
    if r_max == 1.0:
        torch.testing.assert_close(y, batch_norm(x, weight, bias, eps=1e-3)[0])
    if r_max == 1e9:  # without limits it normalizes with the running statistics
        frozen, _ = Running().normalize(x, weight, bias, r, eps=1e-3)
        torch.testing.assert_close(y, frozen)


def test_renorm_s_corrections_are_constants_to_autograd():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True).unbind()
    r = running()
    dy = torch.randn(6, 3, 4, dtype=torch.float64)
    y, _ = Renorm(2.0, 1.0).normalize(x, weight, bias, r)
    _, rr, d = renorm_oracle(x.detach().numpy(), r, weight.detach(), bias.detach(), 2.0, 1.0, 1e-5)
    rr, d = torch.from_numpy(rr), torch.from_numpy(d)
    want, _ = batch_norm(x, weight * rr, weight * d + bias)
    for got, expected in zip(
        torch.autograd.grad(y, (x, weight, bias), dy),
        torch.autograd.grad(want, (x, weight, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_ramps_are_the_paper_s_schedule():
    policy = Renorm()
    values = [
        (float(policy.r_max.at(torch.tensor(t))), float(policy.d_max.at(torch.tensor(t))))
        for t in (0, 5_000, 15_000, 25_000, 40_000, 1_000_000)
    ]
    r = [v for v, _ in values]
    d = [v for _, v in values]
    assert r == pytest.approx([1, 1, 1 + 2 * 10 / 35, 1 + 2 * 20 / 35, 3, 3])
    assert d == pytest.approx([0, 0, 2.5, 5, 5, 5])


def test_renorm_follows_its_ramp_by_the_batches_tracked():
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    weight, bias = torch.ones(3).double(), torch.zeros(3).double()
    policy = Renorm(Ramp(1.0, 3.0, begin=10, end=20), Ramp(0.0, 4.0, begin=10, end=20))
    r = running()
    for batches, r_max, d_max in ((5, 1, 0), (15, 2, 2), (30, 3, 4)):
        y, _ = policy.normalize(x, weight, bias, r._replace(batches=torch.tensor(batches)))
        want, _, _ = renorm_oracle(x.numpy(), r, weight, bias, r_max, d_max, 1e-5)
        np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-9)


def test_renorm_refuses_limits_that_cannot_be():
    with pytest.raises(ValueError, match=r"r_max >= 1, got 0\.5"):
        Renorm(r_max=0.5)
    with pytest.raises(ValueError, match="d_max >= 0, got Ramp"):
        Renorm(d_max=Ramp(-1.0, 3.0, begin=0, end=5))
    with pytest.raises(ValueError, match="0 <= begin < end, got begin=5, end=5"):
        Ramp(1.0, 3.0, begin=5, end=5)


def test_policies_are_values():
    assert Ghost(4) == Ghost(4) != Ghost(8)
    assert repr(Ghost(4)) == "Ghost(size=4)"
    assert {Batch(), Batch(), Running()} == {Batch(), Running()}

"""What the measuring rules measure with: distances and noise, against NumPy on raw values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from batchnorm import Moments
from batchnorm.audit.distance import between
from batchnorm.audit.noise import noise

EPS = 1e-3


def draw(sizes, shift=0.0, scale=1.0, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(shift, scale, (n, 3)) * [1.0, 20.0, 0.3] for n in sizes]


def moments(batches):
    return [Moments.of(torch.tensor(batch), 0) for batch in batches]


def rms(values):
    return math.sqrt(np.mean(np.square(values)))


def test_the_distance_between_two_kinds_of_batches_is_that_of_their_values():
    one, other = draw([5, 9, 4, 7]), draw([6, 6, 8, 3, 5], shift=0.4, scale=1.7, seed=1)
    d = between(moments(one), moments(other), EPS)
    pools = [np.concatenate(kind) for kind in (one, other)]
    sigma = np.sqrt(np.maximum(*(pool.var(0) for pool in pools)) + EPS)
    assert d.shift == pytest.approx(rms((pools[0].mean(0) - pools[1].mean(0)) / sigma))
    logs = [np.log(pool.var(0) + EPS) / 2 for pool in pools]
    assert d.stretch == pytest.approx(rms(logs[0] - logs[1]))
    assert d.stretch_factor == pytest.approx(math.exp(rms(logs[0] - logs[1])))
    shift_error = stretch_error = 0.0
    for kind in (one, other):
        k = len(kind)
        means = np.stack([batch.mean(0) for batch in kind]) / sigma
        shift_error += rms(means.std(0, ddof=1)) ** 2 / k
        rest = [np.concatenate(kind[:i] + kind[i + 1 :]) for i in range(k)]
        left = np.stack([np.log(r.var(0) + EPS) / 2 for r in rest])
        stretch_error += (k - 1) ** 2 / k * np.mean(left.var(0, ddof=1))
    assert d.shift_error == pytest.approx(math.sqrt(shift_error))
    assert d.stretch_error == pytest.approx(math.sqrt(stretch_error))


def test_the_distance_between_batches_has_no_direction():
    one, other = moments(draw([5, 9, 4, 7])), moments(draw([6, 6, 8, 3], shift=2.0, seed=1))
    assert between(one, other, EPS) == between(other, one, EPS)


def test_one_wild_batch_is_no_other_distribution():
    one, other = draw([16] * 8), draw([16] * 8, seed=1)
    other[3] = other[3] * 30
    d = between(moments(one), moments(other), EPS)
    assert d.stretch > math.log(5)
    assert not d.is_harmful


def test_noise_is_the_spread_of_neighbours():
    batches = draw([4] * 9, shift=3.0)
    measured = noise(moments(batches), EPS)
    sigma = np.sqrt(np.concatenate(batches).var(0) + EPS)
    means = np.stack([batch.mean(0) for batch in batches]) / sigma
    logs = np.log(np.stack([batch.var(0) for batch in batches]) + EPS) / 2
    squares = (np.diff(means, axis=0) ** 2 + np.diff(logs, axis=0) ** 2) / 2
    assert measured is not None
    assert measured.value == pytest.approx(math.sqrt(squares.mean()))
    of_square = math.sqrt(1.5 * squares.mean(1).var(ddof=1) / 8)
    assert measured.error == pytest.approx(of_square / (2 * measured.value))


@pytest.mark.parametrize("n", [4, 8, 32])
def test_the_noise_of_normal_values_falls_with_their_number(n):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, n, 64, generator=random, dtype=torch.float64)
    measured = noise([Moments.of(batch, 0) for batch in x], 0.0)
    assert measured is not None
    # the mean's is √(1/n) exactly; a log-deviation's is √(1/2n) for large n, more for small
    assert math.sqrt(1.5 / n) * 0.97 < measured.value < math.sqrt(1.5 / n) * (1 + 1.5 / n)
    assert 0 < measured.error < measured.value / 20


def test_a_drift_is_no_noise():
    batches = [batch + step for step, batch in enumerate(draw([64] * 20))]
    measured = noise(moments(batches), EPS)
    assert measured is not None
    assert measured.value < 0.5


@pytest.mark.parametrize("count", [1, 3])
def test_few_batches_have_no_known_noise(count):
    assert noise(moments(draw([4] * count)), EPS) is None


def test_silent_channels_have_none():
    silent = [np.ones((4, 3)) for _ in range(6)]
    measured = noise(moments(silent), EPS)
    assert measured is not None
    assert (measured.value, measured.error) == (0.0, 0.0)

"""Claim 10: its quick run, its theory and its draws against brute force, and its effects."""

import itertools

import pytest
import torch

from batchnorm.lab.claims.c10_stable_statistics import (
    SIZES,
    StableStatistics,
    drawn_moments,
    excess,
    excess_of,
    missing,
    noise,
    off_slope,
    off_theory,
    variance_of_variance,
)
from batchnorm.lab.results import Results
from batchnorm.moments import Moments
from laboratory import quick


def test_the_quick_run_agrees_with_theory():
    results = quick(StableStatistics)
    perceptron, convolution = (
        next(iter(results.where(layer=layer))) for layer in ("perceptron", "convolution")
    )
    assert (perceptron["positions"], convolution["positions"]) == (1, 49)
    for i, size in enumerate(SIZES):
        assert perceptron["mean_noise"][i] == pytest.approx(1 / size, rel=0.3)
        assert perceptron["biased"][i] == pytest.approx(1 - 1 / size, rel=0.1)
        assert perceptron["var_noise"][i] == pytest.approx(perceptron["theory"][i], rel=0.4)
        exact = convolution["layers"][1] / (49 * size)
        assert convolution["mean_noise"][i] == pytest.approx(exact, rel=0.4)
    assert perceptron["layers"] == pytest.approx([1.0] * 3)
    for hypothesis in StableStatistics.hypotheses:
        hypothesis.judge(results)
    StableStatistics().figure(results)


@pytest.mark.parametrize("values", [2, 3, 4])
def test_the_variance_of_the_variance_is_that_of_all_batches_there_are(values):
    population = torch.tensor([0.0, 1.0, 1.5, 7.0], dtype=torch.float64)
    batches = torch.tensor(list(itertools.product(population.tolist(), repeat=values)))
    brute = batches.double().var(1).var(unbiased=False)
    fourth = (population - population.mean()).pow(4).mean()
    var = population.var(unbiased=False)
    theory = variance_of_variance(var.reshape(1), fourth.reshape(1), values)
    assert theory.item() == pytest.approx(brute.item(), rel=1e-6)


def test_a_drawn_batch_is_a_merger_of_samples():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    drawn = drawn_moments(Moments.of(x, 2), 6, 250, torch.Generator().manual_seed(1))
    chosen = torch.randint(5, (100, 6), generator=torch.Generator().manual_seed(1))
    assert drawn.mean.shape == (250, 3)
    first = x[chosen[7]]
    torch.testing.assert_close(drawn.mean[7], first.mean((0, 2)))
    torch.testing.assert_close(drawn.var()[7], first.var((0, 2), unbiased=False))


def test_the_excess_says_whether_positions_are_alike():
    alike = torch.randn(50, 2, 1, dtype=torch.float64).expand(50, 2, 9)
    assert excess_of(Moments.of(alike, 2)) == pytest.approx(9)
    layout = torch.arange(9.0, dtype=torch.float64).expand(50, 2, 9)  # the same in every sample
    assert excess_of(Moments.of(layout, 2)) == pytest.approx(0, abs=1e-12)
    apart = torch.randn(20_000, 2, 9, dtype=torch.float64)
    assert excess_of(Moments.of(apart, 2)) == pytest.approx(1, rel=0.05)


def test_effects_are_read_off_the_curves():
    def row(layer, seed, positions, factor):
        return {
            "layer": layer,
            "seed": seed,
            "positions": positions,
            "mean_noise": [factor / (positions * size) for size in SIZES],
            "var_noise": [2.0 / size if size != 8 else 1 / size for size in SIZES],
            "theory": [1.5 / size for size in SIZES],
            "biased": [1 - 1 / size for size in SIZES],
        }

    results = Results([row("perceptron", 0, 1, 1.0), row("convolution", 0, 49, 3.0)])
    assert off_slope(results, "perceptron") == pytest.approx([0], abs=1e-9)
    assert off_theory(results) == pytest.approx([1.5])
    assert missing(results, 2) == [50]
    assert noise(results, 256) == [1 / 16]
    assert excess(results) == pytest.approx([3.0])
    steep = {**row("perceptron", 0, 1, 1.0), "mean_noise": [size**-1.25 for size in SIZES]}
    assert off_slope(Results([steep]), "perceptron") == pytest.approx([0.25])

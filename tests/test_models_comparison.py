"""By how much answers differ."""

from __future__ import annotations

import math

import pytest
import torch

from batchnorm.models.comparison import difference, tolerance

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("ours", "expected", "off"),
    [
        ([[1.0, -4.0]], [[1.5, -4.0]], 0.125),
        ([[1.0], [30.0]], [[2.0], [40.0]], 0.5),  # each by its own size
        ([], [], 0.0),
        ([[]], [[]], 0.0),
        ([[0.0]], [[0.0]], 0.0),
        ([[1e-9]], [[0.0]], INF),
        ([[1.0, 2.0]], [[1.0]], INF),
        ([[1.0]], [], INF),
        ([[INF, NAN, 1.0]], [[INF, NAN, 2.0]], 0.5),
        ([[INF]], [[-INF]], INF),
        ([[NAN, 1.0]], [[1.0, 1.0]], INF),
        ([[1.0, 1.0]], [[NAN, 1.0]], INF),
    ],
)
def test_the_difference_is_relative_to_the_largest_value(ours, expected, off):
    assert difference([*map(torch.tensor, ours)], [*map(torch.tensor, expected)]) == off


def test_integers_and_complex_numbers_compare_too():
    assert difference([torch.tensor([1, 4])], [torch.tensor([2, 4])]) == 0.25
    assert difference([torch.tensor([3 + 4j])], [torch.tensor([0j, 5j])[1:]]) == pytest.approx(
        math.sqrt(10) / 5
    )


def test_the_tolerance_is_that_of_the_coarsest_dtype():
    tensors = [torch.ones(1, dtype=d) for d in (torch.float64, torch.bfloat16, torch.int64)]
    assert tolerance(tensors) == 10 * 2.0**-7
    assert tolerance(tensors[:1]) == 1e-5
    assert tolerance(tensors[:1], least=0.0, resolutions=4.0) == 4 * 2.0**-52
    assert tolerance([], least=0.0) == 0.0

"""Figures: what they show is in them, in grey as in colour, and the same each time."""

import re
from itertools import combinations

import matplotlib as mpl
import pytest

from batchnorm.lab.figures import LOOKS, bars, curve, finish, look, panels, to_svg


def drawn():
    figure, (left, right) = panels("left", "right")
    curve(left, "batch", [1, 2], [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    bars(right, ["batch norm", "mine"], [[1.0, 3.0], [2.0]], arms=["batch", "mine"])
    left.set_ylabel("loss (nats)")
    left.legend()
    return figure, left, right


def test_points_are_means_and_bars_their_intervals():
    _, left, right = drawn()
    (container,) = left.containers
    assert container.lines[0].get_ydata().tolist() == [2.0, 2.0]
    ends = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    half = 4.302652729911275 / 3**0.5  # Student's t at 2 degrees of freedom, s = 1
    assert ends[0] == pytest.approx([2 - half, 2 + half])
    assert ends[1] == [2.0, 2.0]
    single = right.containers[1]
    assert single.lines[2][0].get_segments()[0][:, 1].tolist() == [2.0, 2.0]  # one seed: none
    rings = [offset for found in right.collections for offset in found.get_offsets().tolist()]
    assert [1.18, 2.0] in rings


def test_an_interval_on_a_logarithmic_axis_is_that_of_ratios():
    _, (axis,) = panels("one")
    curve(axis, "batch", [1], [[1.0, 100.0]], geometric=True)
    assert axis.containers[0].lines[0].get_ydata().tolist() == pytest.approx([10.0])


def test_letters_and_the_number_of_seeds_are_in_the_file():
    figure, _, _ = drawn()
    text = to_svg(finish(figure, 5, note="500 images"))
    for words in ("loss (nats)", "left", "batch norm", "n = 5 seeds", "95% interval", "500 images"):
        assert words in text, words
    assert "n = 1 seed: no intervals" in to_svg(finish(drawn()[0], 1))


def test_the_same_figure_is_the_same_file():
    assert to_svg(drawn()[0]) == to_svg(drawn()[0])
    assert not re.search(r"[ \t]\n", to_svg(drawn()[0]))


def test_drawing_leaves_matplotlib_s_settings_alone():
    before = dict(mpl.rcParams)
    to_svg(drawn()[0])
    assert dict(mpl.rcParams) == before


def test_arms_differ_without_their_colours():
    for one, other in combinations(LOOKS.values(), 2):
        assert (one.dash, one.marker) != (other.dash, other.marker)
        assert one.marker != other.marker
        assert one.colour != other.colour


def test_arms_without_a_look_are_told_apart_by_their_place():
    assert look("mine", 0) != look("mine", 1)
    assert look("mine", 3).label == "mine"
    assert look("batch", 3) == LOOKS["batch"]

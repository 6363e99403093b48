"""A fingerprint changes with what is measured, and with nothing else."""

import ast
import textwrap

import pytest

from batchnorm.lab import fingerprint as made
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.claims.c01_converges_faster import ConvergesFaster

SOURCE = '''
"""A module."""
from batchnorm.lab.training import train

RATES = (0.1, 1.0)

class Claimed:
    """The sentence.

    The protocol.
    """

    source = "Ioffe & Szegedy 2015"
    bar = 1.5

    def run(self, trial):
        """Train."""
        return train(trial, f"{trial:.2f} at {RATES}")  # as all do

    def figure(self, results):
        return results
'''


def bare(source):
    return made._bare(ast.parse(textwrap.dedent(source)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# as all do", "# for another reason"),
        ('"""Train."""', '"""Train a network."""'),
        ("The protocol.", "The protocol, told better."),
        ('"""A module."""', ""),
        ("Szegedy 2015", "Szegedy 2015, section 3"),
        ("return results", "return results.where(arm='batch')"),
        ("(0.1, 1.0)", "(\n    0.1,\n    1.0,\n)"),
    ],
)
def test_words_layout_and_the_figure_do_not_count(old, new):
    assert old in SOURCE
    assert bare(SOURCE.replace(old, new)) == bare(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.0)", "3.0)"),
        ("bar = 1.5", "bar = 1.4"),
        ("train(trial", "train(self"),
        (".2f", ".3f"),
        ("def run", "def runs"),
    ],
)
def test_what_is_measured_and_the_bars_count(old, new):
    assert old in SOURCE
    assert bare(SOURCE.replace(old, new)) != bare(SOURCE)


def test_it_follows_what_a_claim_uses_and_no_other_s_data():
    reached = made._reached(ConvergesFaster.__module__)
    rooms = {name.removeprefix("batchnorm.lab.") for name in reached}
    assert {
        "claims.c01_converges_faster",
        "training",
        "data.images",
        "networks.perceptron",
    } <= rooms
    assert not {"figures", "data.tables", "data.cart_pole", "networks.policy"} & rooms


def test_every_claim_has_its_own():
    words = [made.fingerprint(claim) for claim in CLAIMS]
    assert len(set(words)) == len(CLAIMS)
    assert all(len(word) == 12 and int(word, 16) >= 0 for word in words)
    assert words == [made.fingerprint(claim) for claim in CLAIMS]

"""The mistakes: that each is the one it is called, and has a rule."""

import torch

from batchnorm.audit import find_rule
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.mistakes import KINDS, MISTAKES, Columns, columns_of, drawn, learn


def test_each_has_a_rule_of_its_own_and_a_kind():
    codes = [mistake.code for mistake in MISTAKES.values()]
    assert len(set(codes)) == len(codes)
    assert [find_rule(code).code for code in codes] == codes
    assert {mistake.kind for mistake in MISTAKES.values()} == set(KINDS)


def test_columns_are_those_of_ink():
    x = torch.zeros(2, 1, 3, 6)
    x[0, 0, 1, 2:5] = torch.tensor([1.0, 2.0, 3.0])
    x[1, 0, :, 0] = 4.0
    sequences, mask = columns_of(x, 7)
    assert sequences.shape == (2, 3, 7)
    assert mask.tolist() == [[True] * 3 + [False] * 4, [True] + [False] * 6]
    assert sequences[0, 1].tolist() == [1, 2, 3, 0, 0, 0, 0]
    assert sequences[1, :, 0].tolist() == [4, 4, 4]
    assert sequences[1, :, 1:].abs().sum() == 0


def test_in_inference_padding_changes_nothing():
    x = digits(0).test.x[:16]
    network = Columns(knows_padding=False).eval()
    short, long = network(*columns_of(x, 8)), network(*columns_of(x, 24))
    torch.testing.assert_close(short, long)


def test_accumulated_gradients_are_those_of_the_whole():
    examples = Examples(torch.randn(8, 3), torch.arange(8) % 2)
    whole = torch.nn.Linear(3, 2)
    parts = torch.nn.Linear(3, 2)
    parts.load_state_dict(whole.state_dict())
    learn(whole, [examples])
    learn(parts, [examples[:4], examples[4:]], accumulated=2)
    torch.testing.assert_close(whole.weight, parts.weight)
    stream = list(drawn(examples, 4, 6, seed=0))
    assert [len(part) for part in stream] == [4] * 6

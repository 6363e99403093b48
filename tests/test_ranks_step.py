"""The step under way, in one process: which passes belong to it, and what is put back."""

from weakref import ref

import pytest
import torch

from batchnorm.ranks.step import Step

pytestmark = pytest.mark.as_installed


def moved(step, *buffers):
    """A layer that tracks: what it holds is kept, and then one more."""
    step.keep(*buffers)
    for buffer in buffers:
        buffer.add_(1)


def test_a_step_ends_where_a_forward_follows_a_backward():
    step, first, second = Step(), torch.zeros(3), torch.zeros((), dtype=torch.int64)
    moved(step, first, second)
    moved(step, first, second)  # called twice in a step: before the first
    step.go_back()
    moved(step, first)  # the next one
    moved(step, second)
    assert step.undo() == 2
    assert first.tolist() == [2] * 3
    assert second.item() == 2
    assert step.undo() == 0
    assert second.item() == 2


def test_a_backward_pass_that_fails_takes_its_forward_back():
    step, buffer = Step(), torch.zeros(3)
    moved(step, buffer)
    step.go_back()
    assert step.undo() == 1
    assert buffer.tolist() == [0] * 3


def test_passes_without_gradients_are_steps_by_themselves():
    step, first, second = Step(), torch.zeros(1), torch.zeros(1)
    with torch.no_grad():
        for _ in range(3):
            moved(step, first)
            moved(step, second)
        moved(step, first)
    step.undo()
    assert (first.item(), second.item()) == (3, 3)


def test_what_a_checkpoint_computes_again_keeps_nothing():
    step, buffer = Step(), torch.zeros(1)
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: step.keep(buffer))
    y.sum().backward()
    assert step.undo() == 0


def test_a_buffer_that_is_no_more_is_neither_kept_alive_nor_taken_for_another():
    step, buffers = Step(), [torch.zeros(3) for _ in range(100)]
    moved(step, *buffers)
    numbers, gone = {id(buffer) for buffer in buffers}, [ref(buffer) for buffer in buffers]
    del buffers
    assert all(each() is None for each in gone)
    others = [torch.zeros(3) for _ in range(1000)]
    again = next(buffer for buffer in others if id(buffer) in numbers)
    moved(step, again)
    step.undo()
    assert again.tolist() == [0] * 3

"""The step under way, in one process: which passes belong to it, and what is put back."""

from weakref import ref

import pytest
import torch

from batchnorm.ranks.step import Step

pytestmark = pytest.mark.as_installed


class Asking:
    """What a pass holds."""


@pytest.fixture
def step():
    made = Step()
    yield made
    if made._hook is not None:
        made._hook.remove()


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)


def moved(step, *buffers):
    """A layer that tracks: what it holds is kept, and then one more."""
    asking = Asking()
    step.begin(asking)
    step.keep(*buffers)
    for buffer in buffers:
        buffer.add_(1)
    return asking


def test_a_step_ends_where_a_forward_follows_a_backward(step):
    first, second = torch.zeros(3), torch.zeros((), dtype=torch.int64)
    asking = moved(step, first, second)
    moved(step, first, second)  # called twice in a step: before the first
    step.go_back(asking)
    moved(step, first)  # the next one
    moved(step, second)
    assert step.undo() == 2
    assert first.tolist() == [2] * 3
    assert second.item() == 2
    assert step.undo() == 0
    assert second.item() == 2


def test_a_backward_pass_that_fails_takes_its_forward_back(step):
    buffer = torch.zeros(3)
    step.go_back(moved(step, buffer))
    assert step.undo() == 1
    assert buffer.tolist() == [0] * 3


def test_a_forward_that_fails_at_its_first_layer_leaves_the_step_before_it(step):
    buffer = torch.zeros(3)
    step.go_back(moved(step, buffer))
    step.begin(Asking())
    assert step.undo() == 0
    assert buffer.tolist() == [1] * 3


def test_an_optimizer_ends_a_step_of_several_passes(step, optimizer):
    buffer = torch.zeros(1)
    for _ in range(2):
        for _ in range(3):
            step.go_back(moved(step, buffer))
        optimizer.step()
    assert step.undo() == 0
    for _ in range(2):
        step.go_back(moved(step, buffer))
    with torch.no_grad():
        moved(step, buffer)
    step.undo()
    assert buffer.item() == 6


def test_an_optimizer_inside_of_a_backward_pass_ends_nothing(step, optimizer):
    buffer, x = torch.zeros(1), torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: optimizer.step())
    for _ in range(2):
        asking = moved(step, buffer)
        y.sum().backward(retain_graph=True)
        step.go_back(asking)
    step.undo()
    assert buffer.item() == 1


def test_what_is_still_to_go_backward_outlives_another_s_step(step, optimizer):
    generator, discriminator = torch.zeros(1), torch.zeros(1)
    for _ in range(2):
        making = moved(step, generator)
        step.go_back(moved(step, discriminator))
        optimizer.step()
        judging = moved(step, discriminator)
        step.go_back(judging)
        step.go_back(making)
        optimizer.step()
    making = moved(step, generator)
    step.go_back(moved(step, discriminator))
    optimizer.step()
    judging = moved(step, discriminator)  # fails on its way back
    step.undo()
    assert (generator.item(), discriminator.item()) == (2, 5)
    del making, judging


def test_a_pass_whose_graph_is_gone_waits_for_nothing(step, optimizer):
    teacher = torch.zeros(1)
    for _ in range(3):
        moved(step, teacher)
        moved(step, teacher)
        optimizer.step()
    moved(step, teacher)
    step.undo()
    assert teacher.item() == 6
    held = []
    for _ in range(3):  # and one that is kept and never goes backward, for the next pass only
        held.append(moved(step, teacher))
        optimizer.step()
    moved(step, teacher)
    step.undo()
    assert teacher.item() == 9


def test_what_a_checkpoint_computes_again_keeps_nothing(step):
    buffer, x = torch.zeros(1), torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: step.begin(y))
    y.register_hook(lambda gradient: step.keep(buffer))
    y.sum().backward()
    assert step.undo() == 0


def test_a_buffer_that_is_no_more_is_neither_kept_alive_nor_taken_for_another(step):
    buffers = [torch.zeros(3) for _ in range(100)]
    for buffer in buffers:
        moved(step, buffer)
    numbers, gone = {id(buffer) for buffer in buffers}, [ref(buffer) for buffer in buffers]
    del buffers, buffer
    assert all(each() is None for each in gone)
    others = [torch.zeros(3) for _ in range(1000)]
    again = next(buffer for buffer in others if id(buffer) in numbers)
    moved(step, again)
    step.undo()
    assert again.tolist() == [0] * 3


def test_of_models_that_come_and_go_nothing_is_left(step):
    buffer, gone = torch.zeros(3), [torch.zeros(3) for _ in range(100)]
    for each in (buffer, *gone):
        moved(step, each)
    del gone, each
    step._room = 100
    moved(step, other := torch.zeros(3))
    assert len(step._kept) == 2
    assert step.undo() == 2
    assert buffer.tolist() == other.tolist() == [0] * 3


def test_of_a_buffer_in_two_layers_the_first_write_counts(step):
    shared, counter = torch.zeros(1), torch.zeros(1)
    moved(step, shared)
    moved(step, shared, counter)
    step.undo()
    assert (shared.item(), counter.item()) == (0, 0)

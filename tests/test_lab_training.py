"""Training: the steps it says, from the seed, and evaluation that leaves no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm1d
from batchnorm.lab.data import Examples
from batchnorm.lab.training import accuracy, error, evaluated, hits, train


@pytest.fixture
def examples():
    x = torch.randn(40, 3)
    return Examples(x, (x[:, 0] > 0).long())


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_is_torch_s(examples):
    ours, theirs = network(), network()
    run = train(ours, examples, rate=0.1, steps=2, batch=40, momentum=0.9, decay=0.01)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(examples.x), examples.y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert run.losses == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)
    assert not run.diverged


def test_the_order_is_the_seed_s(examples):
    ends = []
    for seed in (0, 0, 1):
        model = network()
        train(model, examples, rate=0.1, steps=5, batch=8, seed=seed)
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_rate_rises_over_the_warm_up(examples):
    steps = []
    for step in (1, 2):
        model = network()
        before = weights(model)
        train(model, examples, rate=0.4, steps=1, batch=40, warm_up=4 if step == 1 else 0)
        steps.append(weights(model) - before)
    assert torch.allclose(4 * steps[0], steps[1], atol=1e-6)  # a quarter of the rate at first


def test_gradients_are_clipped(examples):
    model = network()
    before = weights(model)
    train(model, examples, rate=1.0, steps=1, batch=40, clip=1e-3)
    assert float((weights(model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_notes_are_taken_and_may_end_it(examples):
    counted = iter(range(100))
    run = train(
        network(),
        examples,
        rate=0.1,
        steps=30,
        batch=8,
        note=lambda _: float(next(counted)),
        every=4,
        until=lambda value: value >= 3,
    )
    assert run.marks == [(4, 0.0), (8, 1.0), (12, 2.0), (16, 3.0)]
    assert len(run.losses) == 16
    assert run.first(lambda value: value >= 2) == 12
    assert run.first(lambda value: value > 9) is None
    last = train(network(), examples, rate=0.1, steps=5, batch=8, note=lambda _: 0.0, every=4)
    assert [step for step, _ in last.marks] == [4, 5]


def test_a_run_that_diverges_ends(examples):
    model = nn.Linear(3, 2)
    run = train(model, examples, rate=1e30, steps=50, batch=40, loss=lambda y, _: y.square().sum())
    assert run.diverged
    assert len(run.losses) < 50


def test_evaluation_is_of_the_running_statistics_and_leaves_the_mode(examples):
    model = network()
    model.train()
    before = copy.deepcopy(model.state_dict())
    alone = torch.cat([evaluated(model, examples.x[i : i + 1]) for i in range(40)])
    assert torch.allclose(evaluated(model, examples.x, batch=7), alone, atol=1e-6)
    assert model.training
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not torch.allclose(evaluated(model, examples.x, mode="train"), alone, atol=1e-3)


def test_errors_are_percentages_of_wrong_labels(examples):
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert hits(logits, torch.tensor([1, 0, 1, 1])) == 0.75
    constant = nn.Linear(3, 2)
    nn.init.zeros_(constant.weight)
    constant.bias.data = torch.tensor([1.0, 0.0])
    share = float((examples.y == 0).double().mean())
    assert accuracy(constant, examples) == pytest.approx(share)
    assert error(constant, examples) == pytest.approx(100 * (1 - share))

"""Training and evaluating a policy."""

import math

import pytest
import torch

from batchnorm.lab.control import FAILED, controlled, cost, train_policy
from batchnorm.lab.data import CartPole
from batchnorm.lab.networks import RecurrentPolicy, norm_of


def test_doing_nothing_lets_the_pole_fall():
    policy = RecurrentPolicy(None)
    torch.nn.init.zeros_(policy.action.weight)
    torch.nn.init.zeros_(policy.action.bias)
    task = CartPole()
    start = task.start(3, 0)
    state, total = start, torch.zeros(3)
    for _ in range(10):
        state = task.move(state, torch.zeros(3))
        total += task.cost(state, torch.zeros(3)) / 10
    torch.testing.assert_close(controlled(policy, task, start, 10), total)


def test_a_policy_learns_to_balance():
    torch.manual_seed(0)
    policy = RecurrentPolicy(norm_of("layer", of="features"))
    task = CartPole()
    before = cost(policy, task, episodes=32, seed=5, moments=20)
    train_policy(policy, task, rate=0.01, steps=30, moments=20)
    assert cost(policy, task, episodes=32, seed=5, moments=20) < 0.5 * before
    assert policy.training


def test_what_gives_no_number_has_failed():
    policy = RecurrentPolicy(None)
    policy.action.bias.data.fill_(math.nan)
    assert train_policy(policy, CartPole(), rate=0.01, steps=5, moments=3).diverged
    assert cost(policy, CartPole(), episodes=2, seed=0, moments=3) == pytest.approx(FAILED)

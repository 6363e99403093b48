"""Training and evaluating a policy, through the equations of motion of what it controls."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.lab.data import CartPole
from batchnorm.lab.networks import RecurrentPolicy
from batchnorm.lab.training import Run

__all__ = ["FAILED", "controlled", "cost", "train_policy"]

FAILED = 100.0
"""The cost of a policy that gives no number: above that of any that does."""

_CLIP = 1.0


def controlled(
    policy: RecurrentPolicy, task: CartPole, start: Float[Tensor, "episodes 4"], moments: int
) -> Float[Tensor, " episodes"]:
    """Each episode's mean cost over so many moments, from an empty memory."""
    state = start
    memory = start.new_zeros(len(start), policy.width)
    total = start.new_zeros(len(start))
    for _ in range(moments):
        action, memory = policy(task.observe(state), memory)
        state = task.move(state, action)
        total = total + task.cost(state, action)
    return total / moments


def train_policy(
    policy: RecurrentPolicy,
    task: CartPole,
    *,
    rate: float,
    steps: int,
    episodes: int = 4,
    moments: int = 25,
    seed: int = 0,
) -> Run:
    """Lower the mean cost of a few new episodes a step, by Adam, with gradients clipped to norm 1.

    Args:
        policy: It is left in training mode.
        task: Differentiable, so that the gradient is exact and goes back through time.
        rate: The learning rate.
        steps: How many.
        episodes: Of a step: the batch.
        moments: Of an episode.
        seed: Of the episodes' starts.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    device = next(policy.parameters()).device
    run = Run()
    policy.train()
    for step in range(steps):
        start = task.start(episodes, seed * 100_000 + step).to(device)
        value = controlled(policy, task, start, moments).mean()
        run.losses.append(float(value.detach()))
        if not math.isfinite(run.losses[-1]):
            run.diverged = True
            break
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), _CLIP)
        optimizer.step()
    return run


@torch.no_grad()
def cost(
    policy: RecurrentPolicy, task: CartPole, *, episodes: int, seed: int, moments: int = 25
) -> float:
    """The mean cost in inference of episodes drawn from a seed; `FAILED` where it is no number."""
    device = next(policy.parameters()).device
    was = policy.training
    policy.eval()
    try:
        start = task.start(episodes, seed).to(device)
        value = float(controlled(policy, task, start, moments).mean())
    finally:
        policy.train(was)
    return value if math.isfinite(value) else FAILED

"""A cart that balances a pole, whose velocities the policy does not see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CartPole"]

_GRAVITY, _CART, _POLE, _HALF_LENGTH = 9.8, 1.0, 0.1, 0.5


@dataclass(frozen=True)
class CartPole:
    """The equations of motion, differentiable, so that a policy learns through them.

    The state is the cart's position (m), its velocity, the pole's angle (rad) and its velocity;
    the policy sees position and angle alone, which is why it needs a memory. The force (N) is any
    number, at most `strongest` in size.

    Source: Barto, Sutton & Anderson 1983, appendix; integrated by the semi-implicit Euler method.
    """

    step: float = 0.04
    strongest: float = 10.0

    def start(self, episodes: int, seed: int) -> Float[Tensor, "episodes 4"]:
        """States near the upright, each coordinate within ±0.3."""
        generator = torch.Generator().manual_seed(seed)
        return 0.6 * torch.rand(episodes, 4, generator=generator) - 0.3

    def observe(self, state: Float[Tensor, "episodes 4"]) -> Float[Tensor, "episodes 2"]:
        """Position and angle."""
        return state[:, 0::2]

    def move(
        self, state: Float[Tensor, "episodes 4"], action: Float[Tensor, " episodes"]
    ) -> Float[Tensor, "episodes 4"]:
        """The state one step later under a force of `strongest`·tanh(action)."""
        position, velocity, angle, spin = state.unbind(1)
        force = self.strongest * torch.tanh(action)
        sine, cosine = angle.sin(), angle.cos()
        total = _CART + _POLE
        pushed = (force + _POLE * _HALF_LENGTH * spin.square() * sine) / total
        inertia = _HALF_LENGTH * (4 / 3 - _POLE * cosine.square() / total)
        turned = (_GRAVITY * sine - cosine * pushed) / inertia
        moved = pushed - _POLE * _HALF_LENGTH * turned * cosine / total
        velocity, spin = velocity + self.step * moved, spin + self.step * turned
        return torch.stack(
            [position + self.step * velocity, velocity, angle + self.step * spin, spin], 1
        )

    def cost(
        self, state: Float[Tensor, "episodes 4"], action: Float[Tensor, " episodes"]
    ) -> Float[Tensor, " episodes"]:
        """1 − cos(angle) + 0.1 · position² + 0.001 · (force / `strongest`)²."""
        away = 1 - state[:, 2].cos() + 0.1 * state[:, 0].square()
        return away + 0.001 * torch.tanh(action).square()

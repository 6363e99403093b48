"""A small recurrent policy."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.lab.networks.norms import Norm

__all__ = ["RecurrentPolicy"]


class RecurrentPolicy(nn.Module):
    """h′ = tanh(norm(W·observation + U·h)), and an action from h′.

    The same norm serves all moments of an episode, as it has to where episodes have no set length.

    Args:
        norm: Makes the norm of so many channels of (n, channels), or None.
        observations: Numbers seen at a moment.
        width: Of the memory.

    Source: Cooijmans et al. 2017, section 3, for where the norm stands (there with statistics of
    each moment).
    """

    def __init__(self, norm: Norm | None, *, observations: int = 2, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.seen = nn.Linear(observations, width, bias=False)
        self.remembered = nn.Linear(width, width)
        self.norm = nn.Identity() if norm is None else norm(width)
        self.action = nn.Linear(width, 1)
        nn.init.orthogonal_(self.remembered.weight)

    def forward(
        self, observation: Float[Tensor, "n observations"], memory: Float[Tensor, "n width"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n width"]]:
        """The action, and what is remembered."""
        memory = torch.tanh(self.norm(self.seen(observation) + self.remembered(memory)))
        return self.action(memory).squeeze(1), memory

"""The running statistics: used in training too, or left alone by a policy that would move them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from batchnorm.functional import Options, moments, normalize
from batchnorm.moments import Moments
from batchnorm.statistics.policy import RunningStatistics, Statistics

__all__ = ["Running", "Untracked"]


@dataclass(frozen=True)
class Running(Statistics):
    """The running mean and variance, always: `model.train()` or not.

    - `updates`: whether they move towards the batch's in training all the same, after the batch
      was normalized; by default they stay. To gradients they are constants either way.
    """

    updates: bool = False

    needs_running = True

    def __repr__(self) -> str:
        return "Running(updates=True)" if self.updates else "Running()"

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize by the running statistics."""
        running = self.required(running)
        y = normalize(x, running.mean, running.var, weight, bias, **options)
        return y, moments(x, mask=options.get("mask")) if self.updates else None

    def smallest_slice(self, n: int) -> int:
        """Nobody's: no sample's statistics are normalized by."""
        return 0


@dataclass(frozen=True)
class Untracked(Statistics):
    """What another policy normalizes by; the running statistics stay as they are.

    ```python
    BatchNorm2d(64, statistics=Untracked(Batch()))      # eval() uses what was loaded, or learned
    ```
    """

    policy: Statistics

    updates = False

    @property
    def needs_running(self) -> bool:  # type: ignore[override]
        """Whether the other policy reads running statistics."""
        return self.policy.needs_running

    def of(self, layer: nn.Module) -> Statistics:
        """As the other policy."""
        return Untracked(self.policy.of(layer))

    def normalize(
        self,
        x: Float[Tensor, "n c *positions"],
        weight: Float[Tensor, " c"] | None,
        bias: Float[Tensor, " c"] | None,
        running: RunningStatistics | None,
        **options: Unpack[Options],
    ) -> tuple[Float[Tensor, "n c *positions"], Moments | None]:
        """Normalize as the other policy does."""
        return self.policy.normalize(x, weight, bias, running, **options)[0], None

    def smallest_slice(self, n: int) -> int:
        """As the other policy's."""
        return self.policy.smallest_slice(n)

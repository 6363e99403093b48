"""What was measured of each layer and of the run: what a report draws."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.audit.distance import Distance
from batchnorm.audit.noise import Noise

__all__ = ["QUANTILES", "GradientNorm", "LayerProfile", "Period"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class GradientNorm:
    """The Euclidean norm of the loss's gradient by a layer's output, in one backward pass."""

    step: int
    norm: float


@dataclass(frozen=True)
class LayerProfile:
    """One layer; None, or nothing, for what was not measured.

    - `weight`: γ's `QUANTILES` over the channels.
    - `dead`: channels whose output hardly moves, whatever comes in.
    - `distance`: of the running statistics from the batches'.
    - `noise`: of the batch statistics.
    - `gradients`: by step.
    """

    path: str
    channels: int
    weight: tuple[float, ...] | None = None
    dead: int | None = None
    distance: Distance | None = None
    noise: Noise | None = None
    gradients: tuple[GradientNorm, ...] = ()


@dataclass(frozen=True)
class Period:
    """Forward passes of one model in one mode, before it changed.

    - `mode`: `train`, `train without gradients` or `eval`.
    """

    model: str
    mode: str
    passes: int

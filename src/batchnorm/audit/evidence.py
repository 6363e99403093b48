"""What was seen of layers at work: in batches that were run through a model, or in a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from batchnorm.audit.leakage import Leakage
from batchnorm.audit.profile import GradientNorm
from batchnorm.moments import Moments

__all__ = ["Evidence", "LayerEvidence", "Losses", "Origin"]


@dataclass(eq=False)
class Origin:
    """The batches of a layer that came from one place, and the numbers of their passes."""

    batches: list[Moments] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class LayerEvidence:
    """What one layer was given in training, and what it held.

    Tensors are copies in float64 on the CPU.

    - `eps`, `momentum`: the layer's.
    - `weight`: its γ.
    - `running`: its running mean and variance as inference uses them: before the batches were
      run; in a training run at the last evaluation, or at the end.
    - `is_frozen`: whether it was in eval mode while the model trained.
    - `is_new`: whether it has never been trained.
    - `mixes_in_eval`: whether it normalizes with the batch in eval mode too.
    - `batches`: the moments of its input, a forward pass each; in a run, of the last ones.
    - `origins`: the same by where the layer was called from.
    - `masked`: of `batches`, what the user's mask leaves.
    - `deployed`: the moments of its input in eval mode, over deployment's batches.
    - `gradients`: of the loss by its output.
    - `updates`: how many optimizer steps added up the gradients of so many backward passes.
    - `decay`: the weight decay that an optimizer applies to its γ or β.
    - `learns`: whether γ or β had a gradient to get in any training pass that was looked at.
    - `is_averaged`: whether it is part of averaged weights (`AveragedModel`).
    - `is_corrected`: whether it corrects the batch's statistics towards the running ones.
    """

    path: str
    eps: float
    momentum: float | None
    channels: int
    weight: Tensor | None = None
    running: tuple[Tensor, Tensor] | None = None
    is_frozen: bool = False
    is_new: bool = False
    mixes_in_eval: bool = False
    batches: list[Moments] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)
    masked: list[Moments] = field(default_factory=list)
    deployed: list[Moments] = field(default_factory=list)
    gradients: list[GradientNorm] = field(default_factory=list)
    updates: Counter[int] = field(default_factory=Counter)
    decay: float = 0.0
    learns: bool = True
    is_averaged: bool = False
    is_corrected: bool = False

    @property
    def alike(self) -> list[Moments]:
        """Of `batches`, those that came from one place, the one that called most often."""
        kinds = [origin.batches for origin in self.origins.values()]
        return max(kinds, key=len, default=self.batches)


@dataclass(frozen=True)
class Losses:
    """The loss of each batch, in training mode and in eval mode."""

    training: list[float]
    inference: list[float]


@dataclass(eq=False)
class Evidence:
    """What a model's layers were given, in the order of their first calls.

    - `batches`: how many were run through the model; in a run, the layers' forward passes.
    - `is_run`: whether a training run was watched.
    - `uncalled`: paths of layers that were never called.
    - `samples`: of each of several batches, features of each sample that a model was given,
      (n, features), by the path of the model's first layer.
    - `companions`: how much, in eval mode, the outputs of half a batch change when the other half
      is taken away, as a part of the largest output; None where a batch cannot be cut in two.
    - `losses`: where a loss was given.
    - `leakage`: what a later position does to an earlier output, where the model has positions.
    """

    layers: list[LayerEvidence]
    batches: int
    is_run: bool = False
    uncalled: list[str] = field(default_factory=list)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)
    companions: float | None = None
    losses: Losses | None = None
    leakage: Leakage | None = None

"""Whether a later position changes an earlier output in training, which in eval mode it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.calling import Forward, output_of, set_training, with_tensors
from batchnorm.models.snapshot import repeatable

__all__ = ["Leakage", "leakage"]

NOTHING = 1e-5  # of the largest output: what rounding may change


@dataclass(frozen=True)
class Leakage:
    """How much outputs of the first positions change when the inputs of the last ones do.

    As parts of the largest output. `inference` is in eval mode, `training` in training mode.
    """

    inference: float
    training: float

    @property
    def is_shown(self) -> bool:
        """Whether a model that looks at the past alone sees the future in training."""
        return self.inference <= NOTHING < self.training


def leakage(model: nn.Module, batch: Any, forward: Forward) -> Leakage | None:
    """Change the second half of the positions, and watch the outputs of the first half.

    None where the model is no sequence model that looks at the past alone: where in eval mode the
    outputs have no axis of the input's length, where the later inputs change earlier outputs, or
    where the earlier inputs do not change later outputs. Modes, buffers and random
    state are the caller's to put back.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plain = output_of(forward(model, batch))
    except Exception:
        return None  # it computes in training mode alone
    if plain is None:
        return None
    for length in sorted(_lengths(batch) & set(plain.shape[1:]), reverse=True):
        seen = _effects(model.eval(), batch, forward, length)
        if seen is None or not seen[0] <= NOTHING < seen[1]:
            continue
        for module, training in modes.items():
            module.training = training
        set_training(model)
        trained = _effects(model, batch, forward, length)
        return None if trained is None else Leakage(seen[0], trained[0])
    return None


def _lengths(batch: Any) -> set[int]:
    """What may be a number of positions: sizes of a tensor's axes after the first."""
    found: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        found.update(size for size in tensor.shape[1:] if size >= 4)
        return tensor

    with_tensors(batch, note)
    return found


def _effects(
    model: nn.Module, batch: Any, forward: Forward, length: int
) -> tuple[float, float] | None:
    """Of later inputs on earlier outputs, and of earlier inputs on later outputs."""
    again = repeatable(model)

    def outputs(given: Any) -> Tensor | None:
        again()  # the same dropout in each pass
        return output_of(forward(model, given))

    try:
        plain = outputs(batch)
        late = outputs(_changed(batch, length, late=True))
        early = outputs(_changed(batch, length, late=False))
    except Exception:
        return None  # not every input may be changed
    if plain is None or late is None or early is None or plain.shape != late.shape:
        return None
    axes = [axis for axis in range(1, plain.ndim) if plain.shape[axis] == length]
    if len(axes) != 1 or early.shape != plain.shape:
        return None
    scale = plain.double().abs().max().clamp(min=1e-30)
    cut = length // 2

    def effect(changed: Tensor, start: int, size: int) -> float:
        difference = (changed.double() - plain.double()).narrow(axes[0], start, size)
        return float(difference.abs().max() / scale)

    return effect(late, 0, cut), effect(early, cut, length - cut)


def _changed(batch: Any, length: int, *, late: bool) -> Any:
    """The batch with other values in half of its positions, and other statistics."""
    cut = length // 2
    part = slice(cut, length) if late else slice(0, cut)

    def change(tensor: Tensor) -> Tensor:
        axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == length]
        if len(axes) != 1 or tensor.dtype is torch.bool:
            return tensor
        moved = tensor.transpose(0, axes[0]).clone()
        if tensor.is_floating_point():
            moved[part] = 1.5 * moved[part] + 1
        else:  # tokens: those of one sample, which the model is sure to know
            moved[part] = moved[part, :1].clone()
        return moved.transpose(0, axes[0])

    return with_tensors(batch, change)

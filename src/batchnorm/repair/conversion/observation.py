"""One pass of an example: what goes into the norms, and what comes out of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.calling import Forward, call, with_tensors
from batchnorm.models.snapshot import left_as_it_was

__all__ = ["Observation", "difference", "tolerance"]


@dataclass(frozen=True)
class Observation:
    """A pass in eval mode.

    - `shapes`: of each norm's inputs.
    - `outputs`: every tensor of numbers that the model returns.
    """

    shapes: dict[nn.Module, list[torch.Size]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: nn.Module, example: Any, forward: Forward | None, norms: Iterable[nn.Module]
    ) -> Observation:
        """Call the model, and leave it as it was."""
        seen = cls()

        def note(module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
            first = next(iter((*inputs, *given.values())), None)
            if isinstance(first, Tensor):
                seen.shapes.setdefault(module, []).append(first.shape)

        def keep(output: Tensor) -> Tensor:
            if output.is_floating_point():
                seen.outputs.append(output.detach().clone())
            return output

        with left_as_it_was(model):
            model.eval()
            for norm in norms:
                norm.register_forward_pre_hook(note, with_kwargs=True)
            with_tensors((forward or call)(model, example), keep)
        return seen


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of that output."""
    return max((_difference(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def tolerance(outputs: list[Tensor]) -> float:
    """What rounding alone may make of a deep network's outputs."""
    precisions = [torch.finfo(output.dtype).eps for output in outputs]
    return min(1e4 * max(precisions, default=0.0), 0.5)


def _difference(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape or not torch.equal(before.isfinite(), after.isfinite()):
        return math.inf
    finite = before.isfinite()
    a, b = before[finite].double(), after[finite].double()
    if not a.numel():
        return 0.0
    size = float(a.abs().max())
    return float((a - b).abs().max()) / (size or 1.0)

"""One pass of an example: what goes into the norms, and what comes out of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.calling import Forward, call, copied, tensors_of
from batchnorm.models.snapshot import left_as_it_was

__all__ = ["Observation"]


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

        with left_as_it_was(model):
            model.eval()
            for norm in norms:
                norm.register_forward_pre_hook(note, with_kwargs=True)
            outputs = tensors_of((forward or call)(model, copied(example)))  # it may modify that
            seen.outputs.extend(copied([t for t in outputs if t.is_floating_point()]))
        return seen

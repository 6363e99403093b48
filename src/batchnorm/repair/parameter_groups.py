"""Weight decay where it belongs: γ, β and biases in a group of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

__all__ = ["parameter_groups"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # the first: batch and instance norms


def parameter_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    optimizer: Optimizer | None = None,
    biases: bool = True,
    undecayed: str | Sequence[str] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """The parameters of a model in groups for an optimizer, γ and β without weight decay.

    ```python
    torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.1, momentum=0.9)
    torch.optim.AdamW(
        parameter_groups(backbone, 0.05, lr=1e-4)
        + parameter_groups(head, 0.05, undecayed="*.scale", lr=1e-3)
    )
    parameter_groups(model, optimizer=optimizer)    # one that is there already
    ```

    Behind a normalization the length of a weight changes nothing but the size of its gradient, so
    decay there sets the learning rate; on γ and β it shrinks the features themselves.

    - `weight_decay`: of the first group.
    - `optimizer`: in place of `weight_decay`, an optimizer whose groups are split in place: what
      is to have no decay leaves each group that has some for one of its own, which follows it.
      Its state stays; a state_dict of before no longer fits.
    - `biases`: whether biases have no decay either, as in the second source.
    - `undecayed`: patterns of further names, such as `"*.pos_embed"`; of normalizations that
      derive from none of `torch.nn`'s too.
    - `options`: put into each group: `lr=…`, for layers that learn at a rate of their own.

    Returns the parameters with decay, then those without: each that learns once, in the model's
    order, and no group without parameters; of an optimizer all its groups. A parameter that is
    shared has no decay where one of its names has none.

    Raises `ValueError` for a negative or infinite `weight_decay`, for none or one beside an
    optimizer, for patterns that match no name, for options that have no place, and for an
    optimizer that a scheduler drives already, which would not know of the new groups.

    Source: Goyal et al. 2017, "Accurate, large minibatch SGD", section 5.1 (γ and β); He et al.
    2019, "Bag of tricks for image classification", section 3.1, "No bias decay" (biases too).
    """
    apart = {*_of_norms(model), *_named(model, undecayed)}
    if biases:
        names = model.named_parameters(remove_duplicate=False)
        apart |= {id(parameter) for name, parameter in names if _is_bias(name)}
    if optimizer is not None:
        _check_optimizer(optimizer, weight_decay, options)
        if not apart & {id(p) for group in optimizer.param_groups for p in group["params"]}:
            raise ValueError(
                "the optimizer has none of the model's γ, β and biases, so there is nothing to "
                "split; pass the model whose parameters it was given"
            )
        optimizer.param_groups[:] = [
            part for group in optimizer.param_groups for part in _split(group, apart)
        ]
        return optimizer.param_groups
    if not isinstance(weight_decay, (int, float, type(None))):
        raise TypeError(f"weight_decay must be a number, got {weight_decay!r}")
    if weight_decay is None or not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
    if "params" in options:
        raise ValueError("the parameters are the model's: parameter_groups takes no params=")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _split({"params": learning, "weight_decay": float(weight_decay), **options}, apart)


def _split(group: dict[str, Any], apart: set[int]) -> list[dict[str, Any]]:
    """A group, and one without decay for those of its parameters that are to have none."""
    kept, rest = dict(group), {**group, "weight_decay": 0.0}
    for key in ("params", "param_names"):  # the second of optimizers that were given names
        if key in group:
            both = list(zip(group["params"], group[key], strict=True))
            kept[key] = [value for parameter, value in both if id(parameter) not in apart]
            rest[key] = [value for parameter, value in both if id(parameter) in apart]
    if group.get("weight_decay"):
        return [part for part in (kept, rest) if part["params"]]
    return [group] if group["params"] else []


def _check_optimizer(
    optimizer: Optimizer, weight_decay: float | None, options: dict[str, Any]
) -> None:
    if weight_decay is not None or options:
        given = ["weight_decay"] * (weight_decay is not None) + list(options)
        raise ValueError(
            f"an optimizer's groups have settings of their own, got {', '.join(given)} beside it"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer has a learning rate scheduler, which notes its groups when it is made; "
            "split them before"
        )


def _of_norms(model: nn.Module) -> Iterator[int]:
    """γ and β, also those that a parametrization computes γ and β from."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            yield from map(id, module.parameters())


def _named(model: nn.Module, patterns: str | Sequence[str]) -> Iterator[int]:
    """Parameters whose names match."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = [id(parameter) for name, parameter in named if fnmatchcase(name, pattern)]
        if not matching:
            known = ", ".join(name for name, _ in named[:3])
            raise ValueError(
                f"undecayed={pattern!r} matches no parameter; patterns are for whole names, such "
                f"as {known}"
            )
        yield from matching


def _is_bias(name: str) -> bool:
    """Whether a name says so: `bias`, `in_proj_bias`, `bias_ih_l0`, `parametrizations.bias.…`."""
    path = name.split(".")
    if "parametrizations" in path:
        path = path[: path.index("parametrizations") + 2]
    return "bias" in path[-1].split("_")

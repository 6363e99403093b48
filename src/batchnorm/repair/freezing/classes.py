"""Hold a switch of anybody's layer at False, whatever is set and whatever its forward pass is.

PyTorch's layers, and those that people derive from them, read two attributes to decide about
statistics: `training`, whether to use the batch's, and `track_running_stats`, whether the running
ones move in training. The layer's class becomes one derived from its own in which the attribute
is False. What `train()` and `eval()` ask for is remembered, for the way back.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

__all__ = ["Switch", "held", "hold", "let_go"]

Switch = Literal["training", "track_running_stats"]

_MARK = "_held_at_false"


def hold(module: nn.Module, switch: Switch) -> None:
    """Let a module's switch read as False from now on."""
    module.__class__ = _holding(type(module), switch)


def held(module: nn.Module) -> Switch | None:
    """The switch of a module that is held."""
    return getattr(type(module), _MARK, None)


def let_go(module: nn.Module) -> None:
    """Undo `hold`: the class that it was, in the mode that was asked for last.

    Raises `TypeError` where the class has been replaced since, by a parametrization for example.
    """
    kind = type(module)
    if _MARK not in vars(kind):
        raise TypeError(
            f"{kind.__name__} was derived from a frozen layer's class after it was frozen, as "
            "parametrizations and fully_shard do; undo that first"
        )
    assert kind.__base__ is not None
    module.__class__ = kind.__base__


# for good: another class for the same kind would have compiled code compiled again
_classes: dict[tuple[type[nn.Module], Switch], type[nn.Module]] = {}


def _holding(kind: type[nn.Module], switch: Switch) -> type[nn.Module]:
    """The class derived from another that holds a switch."""
    if (kind, switch) not in _classes:
        _classes[kind, switch] = _derived(kind, switch)
    return _classes[kind, switch]


def _derived(kind: type[nn.Module], switch: Switch) -> type[nn.Module]:
    def read(module: nn.Module) -> bool:
        return False

    def write(module: nn.Module, value: bool) -> None:
        """Nothing: whoever puts back what was read would overwrite what is remembered."""

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        kind.train(module, mode)
        vars(module)["training"] = mode
        return module

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # a class that is made here cannot be found by its name
        return _new, (kind, switch), *kind.__reduce_ex__(module, protocol)[2:]

    attributes = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,  # torch.fx takes torch.nn's layers whole
        "__reduce_ex__": reduce,
        "train": train,
        _MARK: switch,
        switch: property(read, write),
    }
    return type(f"Frozen{kind.__name__}", (kind,), attributes)


def _new(kind: type[nn.Module], switch: Switch) -> nn.Module:
    """An empty module, for its state to be put in."""
    holding = _holding(kind, switch)
    return holding.__new__(holding)

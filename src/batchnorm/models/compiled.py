"""Models that `torch.compile(model)` has wrapped."""

from __future__ import annotations

from torch import nn

__all__ = ["is_compiled", "original"]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is a compiled one."""
    # by name: importing the class takes a second, also where nothing is compiled
    return type(module).__qualname__ == "OptimizedModule"


def original(module: nn.Module) -> nn.Module:
    """The module that was compiled, or the module itself."""
    return getattr(module, "_orig_mod", module) if is_compiled(module) else module

"""Optimizers of models whose parameters are fewer than before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import nn

__all__ = ["release"]


def release(
    optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter], undo: ExitStack
) -> None:
    """Take parameters out of an optimizer's groups and state; groups stay, if empty."""
    ids = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        held: list[nn.Parameter] = group["params"]
        kept = [parameter for parameter in held if id(parameter) not in ids]
        if len(kept) < len(held):
            undo.callback(_put_back(held, list(held)))
            held[:] = kept  # in place: some optimizers keep the list itself
    for parameter in [p for p in optimizer.state if id(p) in ids]:
        undo.callback(optimizer.state.__setitem__, parameter, optimizer.state[parameter])
        del optimizer.state[parameter]


def _put_back(held: list[nn.Parameter], before: list[nn.Parameter]) -> Callable[[], None]:
    def put_back() -> None:
        ids = {id(parameter) for parameter in before}
        held[:] = before + [parameter for parameter in held if id(parameter) not in ids]

    return put_back

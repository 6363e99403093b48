"""Leave a model exactly as it was, whatever is done with it meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

__all__ = ["left_as_it_was", "repeatable"]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes, attributes, buffers and random state back; record no gradients.

    Attributes are put back as they were bound, and lists, dictionaries and sets with what they
    held; what other objects changed inside themselves is theirs.
    """
    modules = [m for m in model.modules() if not isinstance(m, (LazyModuleMixin, _SCRIPTED))]
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    held = [_held(value) for _, saved in attributes for value in saved.values()]
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers() if not is_lazy(b)]
    with torch.random.fork_rng(_devices(model)), torch.no_grad():
        try:
            yield
        finally:
            for now, saved in attributes:
                now.clear()
                now.update(saved)
            for put_back in held:
                put_back()
            for module, training in modes.items():
                module.training = training
            for buffer, values in buffers:
                buffer.copy_(values)


def repeatable(model: nn.Module) -> Callable[[], None]:
    """A function that sets the random state back to what it is now, on the model's devices."""
    here = torch.get_rng_state()
    there = {index: torch.cuda.get_rng_state(index) for index in _devices(model)}

    def again() -> None:
        torch.set_rng_state(here)
        for index, state in there.items():
            torch.cuda.set_rng_state(state, index)

    return again


_SCRIPTED = torch.jit.ScriptModule


def _devices(model: nn.Module) -> list[int]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def _held(value: Any) -> Callable[[], None]:
    """What puts back what a container holds now, in the container that it is."""
    if type(value) in (dict, OrderedDict):
        entries = list(value.items())

        def put_back() -> None:
            value.clear()
            value.update(entries)

    elif type(value) is list:
        items = list(value)

        def put_back() -> None:
            value[:] = items

    elif type(value) is set:
        members = set(value)

        def put_back() -> None:
            value.clear()
            value.update(members)

    else:

        def put_back() -> None:
            pass

    return put_back

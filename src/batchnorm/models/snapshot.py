"""Leave a model exactly as it was, whatever is done with it meanwhile."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

__all__ = ["Snapshot", "left_as_it_was", "repeatable", "undone_on_failure"]


class Snapshot:
    """What a model is: classes, modes, attributes, buffers; and its parameters' values if asked.

    Attributes are put back as they were bound, and lists, dictionaries and sets with what they
    held; what other objects changed inside themselves is theirs. Of tensors those are written
    whose values changed, in inference mode where they are from there.

    - `parameters`: keep the parameters' values too, which takes their memory once more.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = False) -> None:
        modules = [m for m in model.modules() if not isinstance(m, (LazyModuleMixin, _SCRIPTED))]
        self._classes = [(m, type(m)) for m in modules]
        self._attributes = [(vars(m), dict(vars(m))) for m in modules]
        values = [value for _, saved in self._attributes for value in saved.values()]
        self._held = [(v, copy(v)) for v in values if type(v) in _CONTAINERS]
        self._modes = {module: module.training for module in model.modules()}
        tensors = [*model.buffers(), *(model.parameters() if parameters else ())]
        self._values = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]

    def restore(self) -> None:
        """Make the model what it was; warn at last of tensors that cannot be written."""
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for now, saved in self._attributes:
            now.clear()
            now.update(saved)
        for container, held in self._held:
            _put_back(container, held)
        for module, training in self._modes.items():
            module.training = training
        lost = []
        for tensor, values in self._values:
            try:
                if not _same_bits(tensor, values):
                    _write(tensor, values)
            except RuntimeError as error:  # the others can be put back all the same
                lost.append(f"{tuple(values.shape)}: {error}")
        if lost:
            warnings.warn(
                f"{len(lost)} tensors of the model keep the values that they were given, since "
                f"they cannot be written. The first of shape {lost[0]}",
                RuntimeWarning,
                stacklevel=2,
            )


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was, and the random state; record no gradients. See `Snapshot`."""
    before = Snapshot(model)
    with torch.random.fork_rng(_devices(model)), torch.no_grad():
        try:
            yield
        finally:
            before.restore()


@contextmanager
def undone_on_failure(model: nn.Module, *, parameters: bool = False) -> Iterator[Snapshot]:
    """Put a model back as it was where the block raises; gives what it was. See `Snapshot`."""
    before = Snapshot(model, parameters=parameters)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


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
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_CONTAINERS = (dict, OrderedDict, list, set)


def _devices(model: nn.Module) -> list[int]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def _same_bits(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor holds these values, NaNs and signs of zeros included."""
    if type(tensor) not in (Tensor, nn.Parameter):  # distributed ones would ask all ranks
        return False
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    kind = _BITS.get(tensor.element_size(), tensor.dtype)
    return tensor.dtype == values.dtype and torch.equal(tensor.view(kind), values.view(kind))


def _write(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor the values that it had."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.layout is torch.strided and 0 in tensor.stride():
            # expanded: all along such a dimension lie in one place, which is written once
            once = tuple(slice(None if stride else 1) for stride in tensor.stride())
            tensor, values = tensor[once], values[once]
        tensor.copy_(values)


def _put_back(container: Any, held: Any) -> None:
    """Give a list, dictionary or set what it held."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(held)

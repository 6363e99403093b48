"""What a model keeps for its backward pass, and what it would keep rematerialized."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from batchnorm.repair.rematerialization import Pass, Saved

__all__ = ["ActivationMemory", "activation_memory"]


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a forward pass keeps for the backward pass, without parameters and inputs."""

    kept: int  # as the model is
    rematerialized: int  # after `rematerialize(model)`
    converted: int  # if torch.nn's batch norms were this library's too, with what they can fuse


def activation_memory(model: nn.Module, *inputs: Tensor) -> ActivationMemory:
    """Run one forward pass in training mode, and add up what autograd keeps of it.

    ```python
    memory = activation_memory(model, torch.randn(32, 3, 224, 224))
    memory.kept, memory.rematerialized       # bytes
    ```

    Memory that several operations keep is counted once. `converted` takes each of torch.nn's
    batch norms with the residual added to its output and the activation behind that, where they
    are calls of PyTorch's own functions, for one layer of this library. The model is left in the
    mode it was in; its running statistics have taken up the inputs.

    Raises `TypeError` for a compiled model, where the compiler decides, and what the model's
    forward pass raises.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("activation_memory cannot see into a compiled model; pass the one before")
    modes = {module: module.training for module in model.modules()}
    counted, fused = _Counted(), _Fused()
    try:
        with torch.enable_grad(), counted, fused:
            model.train()(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    owned = [*model.parameters(), *model.buffers(), *inputs]
    kept, rematerialized = counted.as_it_is, counted.rematerialized
    return ActivationMemory(
        _bytes(kept, owned),
        _bytes(rematerialized, owned),
        _bytes(fused.leaves(rematerialized), owned),
    )


class _Counted(Pass):
    """A forward pass that keeps everything, and notes what it would keep rematerialized."""

    def __init__(self) -> None:
        super().__init__()
        self.as_it_is: list[Tensor] = []
        self.rematerialized: list[Tensor] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        saved = super()._pack(tensor)
        self.as_it_is.append(tensor)
        self.rematerialized += saved.recipe.leaves() if isinstance(saved, Saved) else [tensor]
        return tensor  # alive, so that no other takes its address


_ACTIVATIONS: set[Callable[..., Any]] = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_),
    *(F.elu, F.elu_, F.silu, F.gelu, F.hardswish, F.sigmoid, torch.sigmoid, Tensor.sigmoid),
    *(F.tanh, torch.tanh, Tensor.tanh),
}
_ADDITIONS: set[Callable[..., Any]] = {
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
}


@dataclass
class _Output:
    """What a fused layer would compute: of which tensors, and whether an activation ended it."""

    tensor: weakref.ref[Tensor]
    sources: list[Tensor]
    is_added: bool = False
    is_activated: bool = False


class _Fused(TorchFunctionMode):
    """Watches PyTorch's functions for batch norm, addition, activation, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, _Output] = {}  # by the address of their storage

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # before the call, for it may be in place
        before = [self._output_of(argument) for argument in args[:2]]
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            self._note(result, [args[0] if args else (kwargs or {})["input"]])
        elif func in _ACTIVATIONS and before and before[0] and not before[0].is_activated:
            self._note(result, before[0].sources, before[0].is_added, is_activated=True)
        elif func in _ADDITIONS and len(before) == 2 and (kwargs or {}).get("alpha", 1) == 1:
            self._note_addition(result, args, before)
        return result

    def leaves(self, kept: Iterable[Tensor]) -> list[Tensor]:
        """What is kept, and in place of outputs what those are computed from."""
        leaves: list[Tensor] = []
        todo = list(kept)
        while todo:
            tensor = todo.pop()
            output = self._output_of(tensor)
            if output is None:
                leaves.append(tensor)
            else:
                todo += output.sources
        return leaves

    def _note_addition(self, result: Any, args: Any, before: list[_Output | None]) -> None:
        for normalized, residual in ((0, 1), (1, 0)):
            output = before[normalized]
            if output is None or output.is_added or output.is_activated:
                continue
            if isinstance(args[residual], Tensor) and args[residual].shape == result.shape:
                other = before[residual]
                sources = [args[residual].detach()] if other is None else other.sources
                self._note(result, [*output.sources, *sources], is_added=True)
                return

    def _note(
        self,
        result: Tensor,
        sources: list[Tensor],
        is_added: bool = False,
        *,
        is_activated: bool = False,
    ) -> None:
        output = _Output(weakref.ref(result), [s.detach() for s in sources], is_added, is_activated)
        self._outputs[_address(result)] = output

    def _output_of(self, tensor: Any) -> _Output | None:
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.layout is not torch.strided:
            return None
        output = self._outputs.get(_address(tensor))
        alive = None if output is None else output.tensor()
        return output if alive is not None and _address(alive) == _address(tensor) else None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(kept: Iterable[Tensor], owned: Iterable[Tensor]) -> int:
    """The memory behind the tensors, each piece once, without that of the owned."""
    sizes = {_address(t): t.untyped_storage().nbytes() for t in kept}
    for tensor in owned:
        sizes.pop(_address(tensor), None)
    return sum(sizes.values())

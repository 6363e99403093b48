"""Half the activation memory, exactly: keep recipes for normalized outputs, not the outputs.

conv → batch norm → activation stores two tensors for the backward pass: the convolution's output
x, which the norm asks for, and the activation's output y, which the next convolution asks for. y
is one cheap pass from x, so a recipe for it is kept instead, and it is computed again, by the
same kernel and to the same bits, when the next convolution's backward pass asks.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import Normalization, again, observe_normalizations
from batchnorm.models.frames import is_running

__all__ = ["Pass", "Rematerialization", "Saved", "rematerialize"]


def rematerialize(model: nn.Module) -> Rematerialization:
    """Keep recipes in place of this library's layers' outputs, whenever `model` runs forward.

    ```python
    rematerialize(model)                 # from now on
    with rematerialize(model):           # or for as long as this lasts
        loss_of(model(x)).backward()
    rematerialize(model).remove()        # as for other hooks
    ```

    The loss and every gradient are the same bit for bit. What an output is rebuilt from is kept
    anyway: the layer's input, and its residual where it has one, which may be a recipe itself. A
    chain of residual blocks is rebuilt once, when its last output is asked for, and let go as the
    backward pass goes through it. Outputs that nobody saves, that are modified in place, or that
    come out of a compiled region are left alone; so is a pass inside a checkpoint, other
    `saved_tensors_hooks` or `torch.func`, which keep what they decide. Changes behind autograd's
    back, through `.data` or NumPy, are not seen.

    Raises `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rematerialize takes a torch.nn.Module, got {type(model).__name__}")
    return Rematerialization(model)


class _Running(threading.local):
    """The passes that are under way in a thread, innermost last, each with the frame it began in.

    PyTorch does not tell of a forward pass that Ctrl-C ended, or `sys.exit`: a pass whose frame
    has left the stack is over.
    """

    def __init__(self) -> None:
        self._begun: list[tuple[FrameType, Pass | None]] = []

    def begin(self) -> None:
        """A pass begins; or none does, where somebody else decides what is kept."""
        while self._begun and not is_running(self._begun[-1][0]):
            self.end()
        begun = None if _is_taken() else Pass()  # not by what was left behind, which ended
        if begun is not None:
            begun.__enter__()
        self._begun.append((sys._getframe(2), begun))  # of the module's call

    def end(self) -> None:
        """The innermost ends, if there is one."""
        if self._begun:
            _, ended = self._begun.pop()
            if ended is not None:
                ended.__exit__(None, None, None)

    def end_all(self) -> None:
        """All end that a forward pass left behind."""
        while self._begun:
            self.end()

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()  # a copy of the model has none under way


class Rematerialization:
    """The hooks that `rematerialize` put on a model; leaving it as a context takes them off."""

    def __init__(self, model: nn.Module) -> None:
        self._running = _Running()
        self._handles = (
            model.register_forward_pre_hook(self._begin, prepend=True),
            # also where the forward pass raises, lest the hooks outlive it
            model.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off. Graphs that were recorded keep their recipes."""
        for handle in self._handles:
            handle.remove()
        self._running.end_all()

    def __enter__(self) -> Rematerialization:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiler decides itself what to compute again
            self._running.begin()

    def _end(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._running.end()


def _is_taken() -> bool:
    """Whether somebody else decides what is kept: a checkpoint around the model, say."""
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


_INGREDIENTS = ("x", "residual", "mask", "weight", "bias")  # those of a Normalization


class _Kept:
    """A tensor that a recipe needs, which must not change before the recipe is followed."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def leaves(self) -> list[Tensor]:
        """The tensor alone."""
        return [self._tensor]

    def output(self) -> Tensor:
        """The tensor, as it was."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                "a tensor that a batch norm layer's output is computed again from has been "
                f"modified in place: shape {tuple(self._tensor.shape)}, version "
                f"{self._tensor._version}, expected version {self._version}. The gradient needs "
                "it as it was: do not modify a batch norm layer's input, residual or parameters "
                "between the forward and the backward pass"
            )
        return self._tensor


class _Recipe:
    """How to compute an output again, and the output while there are some who will ask for it."""

    def __init__(self, how: Normalization, ingredients: dict[str, _Kept | _Recipe]) -> None:
        # the moments are the operation's own, which nobody modifies
        self._moments, self._settings = how.moments, how.settings
        self._ingredients = ingredients
        self._saved = self._asked = 0
        self._rebuilt: Tensor | None = None

    def save(self) -> None:
        """Note that somebody keeps the recipe in place of the output."""
        self._saved += 1

    def ask(self) -> Tensor:
        """The output, for one of those who keep the recipe; kept until all have asked."""
        self._asked += 1
        y = self.output()
        if self._asked >= self._saved:  # they may ask all over again: retain_graph
            self._asked, self._rebuilt = 0, None
        return y

    def leaves(self) -> list[Tensor]:
        """The tensors that it keeps alive, those of the recipes that it builds on included."""
        return [leaf for source in self._ingredients.values() for leaf in source.leaves()]

    def output(self) -> Tensor:
        """The output, for another recipe; kept where somebody else will ask for it."""
        if self._rebuilt is not None:
            return self._rebuilt
        t = {name: source.output() for name, source in self._ingredients.items()}
        y = again(Normalization(self._moments, self._settings, **t))
        if self._asked < self._saved:
            self._rebuilt = y
        return y


@dataclass(frozen=True)
class Saved:
    """What autograd keeps in place of a tensor: a recipe, and the part of its output."""

    recipe: _Recipe
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Note:
    """An output as it was made, while it lasts, and its recipe."""

    output: weakref.ref[Tensor]
    version: int
    recipe: _Recipe

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor in the output's memory still shows the output, or a part of it."""
        y = self.output()
        return (
            y is not None
            and y._version == self.version
            and y.dtype == tensor.dtype
            and _storage(y) == _storage(tensor)  # `.data` may have been given another
        )


class Pass:
    """One forward pass: notes every normalization, and looks at every tensor that is saved."""

    def __init__(self) -> None:
        self._notes: dict[int, _Note] = {}  # by the address of the output's storage
        self._observed = observe_normalizations(self._note)
        self._hooked = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> None:
        self._observed.__enter__()
        self._hooked.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooked.__exit__(*error)
        self._observed.__exit__(*error)
        # both hold methods of this, which would keep what was noted until the next collection
        del self._hooked, self._observed
        self._notes.clear()

    def _note(self, y: Tensor, how: Normalization) -> None:
        ingredients: dict[str, _Kept | _Recipe] = {}
        for name in _INGREDIENTS:
            tensor = getattr(how, name)
            if tensor is not None:
                ingredients[name] = self._recipe_of(tensor) or _Kept(tensor)
        # the gradient of the identity does not ask for the residual, which a recipe would keep
        if how.settings.act == "identity" and isinstance(ingredients.get("residual"), _Kept):
            return
        note = _Note(weakref.ref(y), y._version, _Recipe(how, ingredients))
        self._notes[_storage(y)] = note

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        """The recipe of a tensor that is an output, whole and as it was made."""
        note = self._notes.get(_storage(tensor))
        if note is None or not note.is_of(tensor):
            return None
        y = note.output()
        whole = y is not None and (y.shape, y.stride()) == (tensor.shape, tensor.stride())
        return note.recipe if whole else None

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        note = self._notes.get(_storage(tensor))
        if note is None or not note.is_of(tensor):
            return tensor
        note.recipe.save()
        offset = int(tensor.storage_offset())
        return Saved(note.recipe, tuple(tensor.shape), tensor.stride(), offset)


def _unpack(saved: Tensor | Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.recipe.ask().as_strided(saved.shape, saved.stride, saved.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

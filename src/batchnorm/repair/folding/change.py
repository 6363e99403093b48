"""A change to a model that is made and unmade by assignment, as often as one likes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Change"]


@dataclass(frozen=True, eq=False)
class _Slot:
    """One entry of a module's parameters or children: what was there, and what will be."""

    held_in: MutableMapping[str, Any]
    name: str
    old: Any
    new: Any


@dataclass(eq=False)
class Change:
    """New parameters and children for modules; the old ones are kept, and not written to."""

    is_made: bool = False
    _slots: list[_Slot] = field(default_factory=list)

    def set_parameter(self, module: nn.Module, name: str, new: nn.Parameter | None) -> None:
        """Give a module another parameter."""
        self._slots.append(_Slot(module._parameters, name, module._parameters[name], new))

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put a module in another's place, everywhere in a model where that one lies."""
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is old:
                    self._slots.append(_Slot(parent._modules, name, old, new))

    def make(self) -> None:
        """Make it, as a whole or not at all."""
        try:
            for slot in self._slots:
                slot.held_in[slot.name] = slot.new
        except BaseException:  # Ctrl-C too
            self._put_back()
            raise
        self.is_made = True

    def undo(self) -> None:
        """Put back what was there; nothing where it is not made.

        Raises `ValueError` where something else has taken the place of what was put there.
        """
        if not self.is_made:
            return
        for slot in self._slots:
            if slot.held_in.get(slot.name) is not slot.new:
                raise ValueError(
                    f"the model has been changed since: its {slot.name!r} is another object than "
                    "the one that was put there; undo later changes first"
                )
        self._put_back()

    @contextmanager
    def made(self) -> Iterator[None]:
        """Make it for as long as the block lasts."""
        self.make()
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for slot in self._slots:
            slot.held_in[slot.name] = slot.old
        self.is_made = False

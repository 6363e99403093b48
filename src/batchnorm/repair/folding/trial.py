"""Run a model on an example, before a change and with it: what it answers, and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.calling import Forward, copied, tensors_of
from batchnorm.models.snapshot import repeatable
from batchnorm.repair.folding.change import Change

__all__ = ["Call", "Trial"]


@dataclass(frozen=True, eq=False)
class Call:
    """A module's call: what it was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument, or the one named so."""
        return self.args[0] if self.args else self.kwargs.get("input")


class Trial:
    """The same pass again and again: the same example, the same random state."""

    def __init__(self, model: nn.Module, example: Any, forward: Forward) -> None:
        self._model, self._example, self._forward = model, example, forward
        self._again = repeatable(model)
        self._on_gpu = any(p.is_cuda for p in model.parameters())

    def outputs(self) -> list[Tensor]:
        """The tensors that the model answers with."""
        example = copied(self._example)  # which the model may modify
        self._again()
        return tensors_of(copied(self._forward(self._model, example)))

    def seconds(self) -> float:
        """How long a pass takes."""
        example = copied(self._example)
        self._again()
        self._wait()
        start = time.perf_counter()
        self._forward(self._model, example)
        self._wait()
        return time.perf_counter() - start

    def times(self, change: Change, repeats: int) -> tuple[list[float], list[float]]:
        """Seconds without a change and with it, in turn, so that noise hits both alike."""
        without, with_it = [], []
        for _ in range(repeats):
            without.append(self.seconds())
            with change.made():
                with_it.append(self.seconds())
        return without, with_it

    def calls(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Call]]:
        """What modules are given and give in a pass, in order."""
        noted: list[tuple[nn.Module, Call]] = []
        with _watched(modules, noted):
            self.outputs()
        return noted

    def ndims(self, modules: Iterable[nn.Module]) -> dict[nn.Module, set[int]]:
        """How many dimensions the tensors have that modules give in a pass."""
        found: dict[nn.Module, set[int]] = {}

        def after(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(module, set()).add(output.ndim)

        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_hook(after))
            self.outputs()
        return found

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


@contextmanager
def _watched(modules: Iterable[nn.Module], noted: list[tuple[nn.Module, Call]]) -> Iterator[None]:
    given: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((copied(args), copied(kwargs)))  # it may work in place

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        noted.append((module, Call(*given.pop(), copied(output))))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(
                module.register_forward_hook(after, with_kwargs=True, always_call=True)
            )
        yield

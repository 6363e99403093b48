"""The step under way: what it has written to running statistics, to be put back if it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Step", "step", "undo_step"]


_ROOM = 1024  # layers of which something is kept before those that are no more are looked for


@dataclass(frozen=True)
class _Kept:
    """What a layer's buffers held before it wrote to them.

    - `passes`: its forward passes since then that autograd still holds.
    - `is_old`: whether a step has ended since, to which these passes did not belong.
    """

    before: tuple[tuple[ref[Tensor], Tensor], ...]
    passes: WeakSet[object] = field(default_factory=WeakSet)
    is_old: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether there is a buffer to put back."""
        return any(buffer() is not None for buffer, _ in self.before)

    def is_of(self, buffers: Sequence[Tensor]) -> bool:
        """Whether it is of these, and not of some that are no more and had their numbers."""
        return all(kept() is buffer for (kept, _), buffer in zip(self.before, buffers, strict=True))


class Step:
    """What buffers held before the step that is under way wrote to them.

    A step ends with an optimizer's step. Where there is none of `torch.optim` in eager mode, the
    first forward pass after a backward pass begins the next one. A forward pass that is still to
    go backward does not end with an optimizer's step: a generator's passes, while the
    discriminator takes its own. Nothing of this waits for a device, and no buffer is kept alive.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._room = _ROOM
        self._waiting: WeakSet[object] = WeakSet()  # forward passes that are to go backward
        self._asking: ref[object] | None = None
        self._went_back = False
        self._hook: Any = None
        self._has_optimizer = False

    def begin(self, asking: object) -> None:
        """A layer's forward pass is about to ask other ranks, and to write then.

        - `asking`: what nobody holds but the pass and its part of the autograd graph.
        """
        if _goes_backward():
            return
        if self._went_back and not self._has_optimizer:
            self._end()
        self._asking = ref(asking)
        self._waiting.add(asking)  # for as long as it lives: not longer where nothing is recorded

    def keep(self, *buffers: Tensor | None) -> None:
        """Remember what a layer's buffers hold, which it is about to write to."""
        if _goes_backward():
            return  # a checkpoint is computed again: layers track nothing
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._optimized)
        held = [buffer for buffer in buffers if buffer is not None]
        numbers = tuple(map(id, held))
        kept = self._kept.get(numbers)
        if kept is None or kept.is_old or not kept.is_of(held):
            kept = _Kept(tuple((ref(buffer), buffer.detach().clone()) for buffer in held))
            self._kept[numbers] = kept
            if len(self._kept) > self._room:  # models come and go, and nothing ends the step
                self._kept = {n: k for n, k in self._kept.items() if k.is_alive}
                self._room = max(_ROOM, 2 * len(self._kept))
        asking = None if self._asking is None else self._asking()
        if asking is not None:
            kept.passes.add(asking)

    def go_back(self, asking: object) -> None:
        """A backward pass has come to what asked in the forward pass."""
        self._went_back = True
        self._waiting.discard(asking)

    def undo(self) -> int:
        """Put back what the buffers held; returns how many there were."""
        count = 0
        with torch.no_grad():
            for kept in reversed(self._kept.values()):  # of a buffer in two layers the first
                for buffer, before in kept.before:
                    if (held := buffer()) is not None:
                        held.copy_(before)
                        count += 1
        self._kept.clear()
        self._waiting.clear()
        self._went_back = False
        return count

    def _optimized(self, *_: object) -> None:
        """An optimizer has taken its step; one inside a backward pass ends nothing."""
        if torch.compiler.is_compiling() or _goes_backward():
            return
        self._has_optimizer = True
        self._end()

    def _end(self) -> None:
        """The step is complete, but for passes that are still to go backward."""
        self._went_back = False
        self._kept = {
            numbers: replace(kept, is_old=True)
            for numbers, kept in self._kept.items()
            if any(each in self._waiting for each in kept.passes)
        }


step = Step()
"""This process's."""


def undo_step() -> None:
    """Put the running statistics of synchronized layers back to before the step under way.

    A `SyncError` has done so already. Call this where something else ends a step in its middle: an
    error of `DistributedDataParallel`'s own communication, of a loss, of a loader; a Ctrl-C.
    Then the running statistics belong to the parameters, as the optimizer's last step left both.

    ```python
    try:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    except BaseException:
        batchnorm.undo_step()
        raise
    ```

    A step is all forward and backward passes since an optimizer's last step, with gradient
    accumulation several, and passes without gradients too. After an optimizer's step there is
    nothing to put back. Where no optimizer of `torch.optim` ever steps in this process in eager
    mode, the first forward pass after a backward pass begins the next step.

    Ranks may differ by one step: what one rank completed may have failed on another. Layers in a
    region that torch.compile has compiled are not put back.
    """
    step.undo()


def _goes_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)

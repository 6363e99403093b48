"""The step under way: what it has written to running statistics, to be put back if it fails."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

__all__ = ["Step", "step", "undo_step"]


class Step:
    """What buffers held before the step that is under way wrote to them.

    A step is a forward pass and the backward pass that follows it: the first layer that
    normalizes after a backward pass begins the next one. Passes without gradients are steps by
    themselves. Nothing of this waits for a device, and no buffer is kept alive.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[ref[Tensor], Tensor]] = {}
        self._went_back = False

    def keep(self, *buffers: Tensor | None) -> None:
        """Remember what a layer's buffers hold, which it is about to write to."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint is computed again: layers track nothing
        held = [buffer for buffer in buffers if buffer is not None]
        if self._went_back or (not torch.is_grad_enabled() and any(map(self._keeps, held))):
            self._before.clear()
            self._went_back = False
        for buffer in held:
            if not self._keeps(buffer):
                self._before[id(buffer)] = ref(buffer), buffer.detach().clone()

    def _keeps(self, buffer: Tensor) -> bool:
        """Whether a buffer is kept: it, and not one that is no more and had its number."""
        kept = self._before.get(id(buffer))
        return kept is not None and kept[0]() is buffer

    def go_back(self) -> None:
        """A backward pass has come: what follows it is the next step."""
        self._went_back = True

    def undo(self) -> int:
        """Put back what the buffers held; returns how many there were."""
        count = 0
        with torch.no_grad():
            for kept, before in self._before.values():
                buffer = kept()
                if buffer is not None:
                    buffer.copy_(before)
                    count += 1
        self._before.clear()
        self._went_back = False
        return count


step = Step()
"""This process's."""


def undo_step() -> None:
    """Put the running statistics of synchronized layers back to before the step under way.

    A `SyncError` has done so already. Call this where something else ended a step in its middle,
    in forward or backward: an error of `DistributedDataParallel`'s own communication, of a loss,
    of a loader. Then what a rank saves is the last step that all ranks completed.

    ```python
    try:
        criterion(model(x), y).backward()
    except RuntimeError:
        batchnorm.undo_step()
        raise
    ```

    A step is a forward and a backward pass; it counts as under way until the next forward.
    Layers in a region that torch.compile has compiled are not put back.
    """
    step.undo()

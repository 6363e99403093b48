"""Which calls are under way: PyTorch does not tell of a forward pass that Ctrl-C ended."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["is_running"]


def is_running(frame: FrameType) -> bool:
    """Whether a frame is on this thread's stack."""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None

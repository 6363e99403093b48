"""A normalization that was computed, so that it can be computed again to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["Normalization", "Settings", "observe_normalizations", "observer"]


class Settings(NamedTuple):
    """What a normalization is told beside its tensors."""

    frozen: bool  # whether the moments are constants, and not x's own
    groups: int
    eps: float
    act: str
    parameter: float  # the activation's


@dataclass(frozen=True)
class Normalization:
    """The arguments of one, as the operation takes them, with the moments that it used."""

    moments: Moments  # (*g, c)
    settings: Settings
    x: Tensor  # (n, c, *p)
    residual: Tensor | None = None  # (n, c, *p)
    mask: Tensor | None = None  # (n, *p)
    weight: Tensor | None = None  # (c,)
    bias: Tensor | None = None  # (c,)


class _Observer(threading.local):
    """Who is told of every normalization in eager mode that autograd records, in this thread."""

    notify: Callable[[Tensor, Normalization], None] | None = None


observer = _Observer()


@contextmanager
def observe_normalizations(notify: Callable[[Tensor, Normalization], None]) -> Iterator[None]:
    """Call `notify(y, normalization)` after each that autograd records; the innermost is told."""
    before, observer.notify = observer.notify, notify
    try:
        yield
    finally:
        observer.notify = before

"""BN111: two forward passes of a distributed model before a backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import unserializable_hook

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.place import calling_place
from batchnorm.audit.rule import Rule

__all__ = ["TwoForwards", "is_affected"]


class TwoForwards(Rule):
    """## What it finds

    A `DistributedDataParallel` model with broadcast of its buffers that is called twice before a
    backward pass, on a version of PyTorch where that fails.

    ## Why it hurts

    Before each forward pass, rank 0's running statistics are written over every rank's. The
    backward pass of the first call finds the tensors that it saved changed, and raises `one of
    the variables needed for gradient computation has been modified by an inplace operation`.

    ## Example

        loss = criterion(disc(real), 1) + criterion(disc(fake), 0)      # disc = DDP(...)
        loss.backward()                                                 # raises

    ## Fix

    One call, `disc(torch.cat([real, fake]))`, which normalizes both together; a backward pass
    for each; or `DistributedDataParallel(..., broadcast_buffers=False)`, with the statistics
    brought together before they are evaluated or saved.

    ## When it is fine

    On a PyTorch whose broadcast leaves the version of what it writes alone
    (pytorch/pytorch#175851); there the rule is silent.

    ## Evidence

    pytorch/pytorch#22095, pytorch/pytorch#66504, pytorch/pytorch#175024
    """

    code = "BN111"
    name = "two distributed forwards, one backward"
    looks_at = "run"

    def __init__(self) -> None:
        self._forwards: WeakKeyDictionary[DistributedDataParallel, int] = WeakKeyDictionary()
        self._places: WeakKeyDictionary[DistributedDataParallel, str | None] = WeakKeyDictionary()
        self._found: dict[str | None, int] = {}

    def entering(self, model: DistributedDataParallel) -> None:
        """Number the forward passes that gradients can come back to."""
        broadcasts = model.broadcast_buffers and next(model.buffers(), None) is not None
        if broadcasts and torch.is_grad_enabled():
            self._forwards[model] = self._forwards.get(model, 0) + 1
            self._places[model] = calling_place()

    def after(self, call: Call) -> None:
        """When gradients come back to a pass, see whether another has begun since."""
        model, output = call.root, call.output
        if not isinstance(model, DistributedDataParallel) or output is None:
            return
        number = self._forwards.get(model)
        if number is None or not output.requires_grad:
            return

        def come_back(gradient: Tensor) -> None:
            since = self._forwards.get(model, number) - number
            if since > 0:
                place = self._places.get(model)
                self._found[place] = max(since, self._found.get(place, 0))

        output.register_hook(unserializable_hook(come_back))

    def findings(self) -> Iterator[Finding]:
        """One for each place in the user's code."""
        for place, since in self._found.items() if is_affected() else ():
            yield self.found(
                Severity.WARNING,
                f"{1 + since} forward passes before a backward pass, each of which overwrites the "
                "running statistics that the one before it saved",
                ["DistributedDataParallel"],
                "call the model once on torch.cat of the inputs, or broadcast_buffers=False",
                place=place,
                forwards=1.0 + since,
            )


@lru_cache(maxsize=1)
def is_affected() -> bool:
    """Whether this PyTorch's broadcast changes the version of the buffers that it writes."""
    sources = inspect.getsource(inspect.getmodule(DistributedDataParallel) or torch)
    return "_unsafe_preserve_version_counter" not in sources

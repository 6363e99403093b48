"""What a layer is called in the model that runs, so that ranks can tell whether they agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary
from zlib import crc32

from torch import nn

__all__ = ["UNKNOWN", "WRAPPERS", "Caller", "caller_of"]

# what DistributedDataParallel, torch.compile and FSDP put between a model and its parts
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_TAGS = 2**20


class Caller(NamedTuple):
    """Who takes part in a collective.

    - `name`: a layer's path, `ResNet.layer1.0.bn1`.
    - `tag`: a number below 2^20 that tells one path from another; 0 where it is not known.
    """

    name: str
    tag: int


UNKNOWN = Caller("a batch norm layer", 0)

_callers: WeakKeyDictionary[nn.Module, Caller] = WeakKeyDictionary()


def caller_of(layer: nn.Module) -> Caller:
    """The layer as its model calls it, looked up at its first call and then remembered."""
    known = _callers.get(layer)
    if known is None:
        known = _named(layer, "")
        for root in _running_modules():  # the outermost comes last, and its name stays
            paths = (name for name, module in root.named_modules() if module is layer)
            path = next(paths, None)
            known = known if path is None else _named(root, path)
        _callers[layer] = known
    return known


def _running_modules() -> Iterator[nn.Module]:
    """The modules whose calls are under way in this thread, from the innermost on."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]


def _named(root: nn.Module, path: str) -> Caller:
    parts = ".".join(part for part in path.split(".") if part not in WRAPPERS)
    while len(root._modules) == 1 and next(iter(root._modules)) in WRAPPERS:
        (wrapped,) = root._modules.values()
        if wrapped is None:
            break
        root = wrapped
    return Caller(".".join(filter(None, (type(root).__name__, parts))), _tag(parts))


def _tag(path: str) -> int:
    return 1 + crc32(path.encode()) % (_TAGS - 1)

"""Where in the user's code a model was called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType

from torch import nn

__all__ = ["calling_place", "is_called_within", "module_path"]

_MODULE_CALL = nn.Module._call_impl.__code__


def _frames() -> Iterator[FrameType]:
    """The stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def module_path(module: nn.Module) -> str:
    """A module's path below the outermost module that is being called: `ResNet.layer1.0.bn2`."""
    root: nn.Module = module
    for frame in _frames():
        if frame.f_code is _MODULE_CALL:
            root = frame.f_locals["self"]
    modules = root.named_modules(prefix=type(root).__name__)
    return next((name for name, candidate in modules if candidate is module), type(module).__name__)


def calling_place() -> str | None:
    """`file:line` of the user's own code from which the outermost module is being called."""
    outside: list[FrameType] = []
    for frame in _frames():
        outside.append(frame)
        if frame.f_code is _MODULE_CALL:
            outside.clear()
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    for frame in outside:
        filename = frame.f_code.co_filename
        if filename == script or not _is_library(filename):
            return f"{_displayed(filename)}:{frame.f_lineno}"
    return None


def is_called_within(names: frozenset[tuple[str, str]]) -> bool:
    """Whether a function is on the stack, each named by its file's end and its own name."""
    return any(
        frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)
        for frame in _frames()
        for file, name in names
    )


@lru_cache(maxsize=4096)
def _is_library(filename: str) -> bool:
    """Installed code, the interpreter's own, or no file at all."""
    path = Path(filename)
    inside = path.parts
    return (
        filename.startswith("<")
        or "site-packages" in inside
        or "dist-packages" in inside
        or Path(__file__).parents[1] in path.parents
        or Path(nn.__file__).parents[1] in path.parents
        or Path(sys.base_prefix, "lib") in path.parents
    )


def _displayed(filename: str) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(filename).resolve()
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

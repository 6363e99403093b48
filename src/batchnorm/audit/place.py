"""Where in the user's code a model was called."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType

from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DataParallel, DistributedDataParallel

from batchnorm.models.compiled import is_compiled

__all__ = [
    "calling_place",
    "displayed",
    "is_inside",
    "is_inside_autograd_function",
    "place_of",
    "root_call",
    "root_module",
    "trail",
]

_WRAPPERS = (DataParallel, DistributedDataParallel)
_MODULE_CALL = nn.Module._call_impl.__code__


def root_module() -> nn.Module | None:
    """The outermost module that is being called."""
    return root_call()[0]


def root_call() -> tuple[nn.Module | None, Tensor | None]:
    """The outermost module that is being called, and the first tensor that it was given."""
    outermost: FrameType | None = None
    for frame in _frames():
        if frame.f_code is _MODULE_CALL:
            outermost = frame
    if outermost is None:
        return None, None
    variables = outermost.f_locals
    given = (*variables["args"], *variables["kwargs"].values())
    return variables["self"], next((x for x in given if isinstance(x, Tensor)), None)


def trail() -> str:
    """`file:line` of each frame of the user's code, the outermost first: where a call comes from.

    `train.py:12#84 > net.py:30#6`; behind the # stands which instruction, so that two calls from
    one line are two.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    names = [
        f"{_displayed(frame.f_code.co_filename)}:{frame.f_lineno}#{frame.f_lasti}"
        for frame in _frames()
        if frame.f_code.co_filename == script or not _is_library(frame.f_code.co_filename)
    ]
    return " > ".join(reversed(names))


def calling_place() -> str | None:
    """`file:line` of the user's own code from which the outermost module is being called."""
    outside: list[FrameType] = []
    for frame in _frames():
        outside.append(frame)
        if frame.f_code is _MODULE_CALL and not _only_wraps(frame.f_locals["self"]):
            outside.clear()
    return _first_of_the_user(outside)


def place_of(thread: int | None) -> str | None:
    """`file:line` of the user's own code in which a thread stands, by the thread's number."""
    frame = None if thread is None else sys._current_frames().get(thread)
    return None if frame is None else _first_of_the_user(_frames(frame))


def _first_of_the_user(frames: Iterable[FrameType]) -> str | None:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    for frame in frames:
        filename = frame.f_code.co_filename
        if filename == script or not _is_library(filename):
            return f"{displayed(Path(filename))}:{frame.f_lineno}"
    return None


def _only_wraps(module: nn.Module) -> bool:
    """Whether a module calls the model from code that is no part of the model.

    A module of Lightning is one: below `DistributedDataParallel` its training step is called
    through `forward`.
    """
    wraps = isinstance(module, _WRAPPERS) or is_compiled(module)
    return wraps or hasattr(module, "training_step")


def is_inside(functions: frozenset[tuple[str, str]]) -> bool:
    """Whether one of these is on the stack, each given by its file's end and its own name."""
    return any(
        frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)
        for frame in _frames()
        for file, name in functions
    )


def is_inside_autograd_function() -> bool:
    """Whether an `autograd.Function` is computing its forward, which it does without gradients."""
    for frame in _frames():
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            first = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                return True
    return False


def displayed(path: Path) -> str:
    """A path as people read it: relative to the working directory where it lies below it."""
    path = path.resolve()
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@lru_cache(maxsize=4096)
def _displayed(filename: str) -> str:
    return displayed(Path(filename))


def _frames(frame: FrameType | None = None) -> Iterator[FrameType]:
    """A stack, innermost first; by default that of who asks."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


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

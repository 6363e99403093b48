"""A model and its input, as they are named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

__all__ = [
    "in_one_line",
    "input_like",
    "load_batches",
    "load_model",
    "load_module",
    "names_model",
    "shape_of",
]


def names_model(target: str) -> bool:
    """Whether a target is of the form `package.module:make_model` or `file.py:make_model`."""
    module, colon, name = target.rpartition(":")
    return bool(module and colon and name.replace(".", "").isidentifier())


def load_model(target: str) -> nn.Module | ExportedProgram:
    """What `package.module:make_model` names: a function or class that makes a model, or a model.

    `path/to/file.py:make_model` is looked up in that file. A program that `torch.export` made is
    a model too.

    Raises `ValueError` where there is none, with what was found instead.
    """
    made = _made(target, (nn.Module, ExportedProgram))
    if not isinstance(made, (nn.Module, ExportedProgram)):
        raise ValueError(f"{target} is {type(made).__name__}, no torch.nn.Module or what makes one")
    return made


def load_module(target: str) -> nn.Module:
    """A model that is no exported program; see `load_model`."""
    made = load_model(target)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target} is an exported program; give the model that it was made of")
    return made


def load_batches(target: str) -> Iterable[object]:
    """What `package.module:loader` names: an iterable of batches, or a function that makes one.

    Raises `ValueError` where there is none, with what was found instead.
    """
    made = _made(target, (Iterable,))
    if not isinstance(made, Iterable):
        raise ValueError(f"{target} is {type(made).__name__}, no iterable of batches")
    return made


def _made(target: str, kinds: tuple[type, ...]) -> object:
    """What a target names, called where it is of none of the kinds itself but can be."""
    module_name, _, name = target.rpartition(":")
    if not names_model(target):
        raise ValueError(
            f"{target!r} names nothing; write package.module:name or path/to/file.py:name, of a "
            "function that takes no arguments"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as `python -m` has it
    try:
        found: object = _module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot import {module_name}: {in_one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {name}; name a function or class of it")
        found = getattr(found, part)
    if isinstance(found, kinds) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}() failed: {in_one_line(error)}") from error


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        if "/" in name:
            raise ImportError(f"a path must name a file: {name}.py")
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    sys.path.insert(0, str(path.resolve().parent))  # for what lies beside it, as a script has it
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


def shape_of(text: str) -> tuple[int, ...]:
    """`32,3,224,224` as a shape; raises `ValueError` for anything else."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").replace("×", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"{text!r} is no shape; write the sizes, such as 32,3,224,224")
    return shape


def input_like(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Normal noise of a shape, of the dtype and on the device of the model's first parameter."""
    like = next(model.parameters(), torch.empty(0))
    generator = torch.Generator(like.device).manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=generator, dtype=dtype, device=like.device)


def in_one_line(error: BaseException) -> str:
    """An exception's kind and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[0].split())}"

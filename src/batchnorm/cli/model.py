"""A model and its input, as they are named on the command line."""

from __future__ import annotations

import importlib
import sys

import torch
from torch import Tensor, nn

__all__ = ["input_like", "load_model", "shape_of"]


def load_model(target: str) -> nn.Module:
    """What `package.module:make_model` names: a function or class that makes a model, or a model.

    Raises `ValueError` where there is none, with what was found instead.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ValueError(
            f"{target!r} names no model; write package.module:make_model, a function that takes "
            "no arguments and returns one"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as `python -m` has it
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import {module_name}: {_said(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {name}; name a function or class of it")
        found = getattr(found, part)
    made: object = found
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ValueError(f"{target} is {type(made).__name__}, no function that makes a model")
        try:
            made = made()
        except Exception as error:
            raise ValueError(f"{name}() failed: {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name}() returned {type(made).__name__}, no torch.nn.Module")
    return made


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


def _said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

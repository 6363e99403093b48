"""Checkpoints that a command reads into a model, and writes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchnorm.models.checkpoint import PICKLED, holds_tensors_alone, read_tensors
from batchnorm.report.files import replacing

__all__ = [
    "WRITTEN",
    "checked_destination",
    "load_weights",
    "read_arrays",
    "save_tensors",
    "tensors_of",
]

WRITTEN = (".safetensors", *PICKLED)


def checked_destination(
    output: Path | None,
    sources: list[Path],
    *,
    in_place: bool | None = None,
    forms: tuple[str, ...] = WRITTEN,
) -> Path:
    """Where a checkpoint goes, known to be writable before anything is computed.

    - `in_place`: whether it may be the source; None where nobody can ask for that.

    Raises `ValueError` for a form that is not written, a directory that is not there, and for an
    input file that would be overwritten without `--in-place`.
    """
    if output is None and in_place and len(sources) == 1:
        output = sources[0]
    if output is None:
        otherwise = "" if in_place is None else ", or --in-place"
        raise ValueError(f"nowhere to write to; give -o out.safetensors{otherwise}")
    if not in_place and any(output.resolve() == source.resolve() for source in sources):
        otherwise = "" if in_place is None else ", or say --in-place"
        raise ValueError(f"{output} is an input; give another path to -o{otherwise}")
    if output.suffix not in forms:
        raise ValueError(f"{output.name} names no form to write; its name ends in {_any(forms)}")
    if not output.parent.is_dir():
        raise ValueError(f"no directory {output.parent} to write {output.name} into; create it")
    return output


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model that a checkpoint can hold.

    Raises `ValueError` for one that keeps more than tensors in it (`get_extra_state`).
    """
    state = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"the model's state_dict holds more than tensors, {others[0]!r}, which the commands "
            "do not write; call the repair in Python and save the model as it is saved elsewhere"
        )
    return state


def load_weights(model: nn.Module, path: Path) -> bool:
    """Load a checkpoint into the model: its state dict, alone or inside a trainer's dictionary.

    Returns whether the file holds nothing else.

    Raises `ValueError` for a file that is none, and for one that does not hold each of the
    model's tensors, and no others; counts of batches may be missing.
    """
    held, wanted = read_tensors(path), tensors_of(model)
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    prefixes = _prefixes(held, needed)
    if not prefixes:
        raise ValueError(f"{path} does not fit the model: {_what_is_missing(held, needed)}")
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} holds several state dicts that fit, {_any(tuple(prefixes))}; save the one "
            "that is meant in a file of its own"
        )
    (prefix,) = prefixes
    state = {key.removeprefix(prefix): held[key] for key in held if key.startswith(prefix)}
    for key, tensor in state.items():
        if key not in wanted:
            raise ValueError(f"{path} holds {prefix}{key}, which the model has not")
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{prefix}{key} has shape {tuple(tensor.shape)} in {path}, "
                f"{tuple(wanted[key].shape)} in the model"
            )
    model.load_state_dict(state, strict=False)  # the counts
    return not prefix and holds_tensors_alone(path)


def read_arrays(path: Path) -> Mapping[str, Tensor | np.ndarray]:
    """Arrays by name, of NumPy's .npz or of a checkpoint.

    Raises `ValueError` for a file that is none.
    """
    if path.suffix != ".npz":
        return read_tensors(path)
    try:
        with np.load(path) as held:  # which unpickles nothing
            return dict(held)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, in the form that the file's name asks for; whole or not at all."""
    # safetensors takes no memory twice; tied weights become copies
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(copies, temporary, metadata={"format": "pt"})
        else:
            torch.save(copies, temporary)


def _prefixes(held: Mapping[str, Tensor], needed: set[str]) -> list[str]:
    """Below which keys, such as `state_dict.`, everything lies that is needed."""
    if not needed:
        return [""]
    some = max(needed, key=len, default="")  # the longest name is the end of fewest others
    candidates = (key.removesuffix(some) for key in held if key.endswith(some))
    ends = [prefix for prefix in candidates if not prefix or prefix.endswith(".")]
    return [prefix for prefix in ends if all(prefix + key in held for key in needed)]


def _what_is_missing(held: Mapping[str, Tensor], needed: set[str]) -> str:
    missing = sorted(key for key in needed if key not in held)
    return f"it has no {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")


def _any(names: tuple[str, ...]) -> str:
    return ", ".join(name or '""' for name in names)

"""The batch norm layers of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from batchnorm.audit.state import LayerState, State
from batchnorm.models.checkpoint import PICKLED, read_tensors

__all__ = ["SUFFIXES", "checkpoints_at", "read_checkpoint"]

SUFFIXES = (".onnx", ".safetensors", *PICKLED)


def checkpoints_at(path: Path) -> list[Path]:
    """A checkpoint, or those that lie in a directory, by name.

    Raises `ValueError` where there is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"no checkpoint in {path}; checkpoints end in {', '.join(SUFFIXES)}")
    return found


def read_checkpoint(path: Path) -> State:
    """The batch norm layers of a checkpoint; of safetensors nothing else is read into memory.

    A batch norm layer is where running statistics are, or their count.

    Raises `ValueError`; see `read_tensors`.
    """
    return State(str(path), _layers(read_tensors(path)))


def _layers(tensors: Mapping[str, Tensor]) -> tuple[LayerState, ...]:
    paths = dict.fromkeys(
        key.rpartition(".")[0]
        for key in tensors
        if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    )
    return tuple(_layer(path, tensors) for path in paths)


def _layer(path: str, tensors: Mapping[str, Tensor]) -> LayerState:
    def held(name: str) -> Tensor | None:
        return tensors.get(f"{path}.{name}" if path else name)

    return LayerState(
        path or "(root)",
        weight=held("weight"),
        bias=held("bias"),
        running_mean=held("running_mean"),
        running_var=held("running_var"),
        batches=held("num_batches_tracked"),
    )

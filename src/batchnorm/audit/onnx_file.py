"""ONNX files: their batch norm layers and the order of their operations, nothing of it run."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.audit.state import LayerState, State
from batchnorm.models.graph import Graph, Node

__all__ = ["read_onnx"]

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare")


def read_onnx(path: Path) -> tuple[State, Graph]:
    """The batch norm layers of an ONNX file, and the order of its operations.

    An exporter may have folded them into convolutions; then there are none.

    Raises `ValueError`, in one line, for a file that is none or is damaged, and where the onnx
    package is not installed.
    """
    if find_spec("onnx") is None:
        raise ValueError(f"reading {path} needs the onnx package; pip install 'batchnorm[onnx]'")
    import onnx

    try:
        # weights that lie in other files are not looked up: their paths are the file's to name
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ValueError(f"no ONNX file at {path}") from error
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    if not model.HasField("graph"):
        raise ValueError(f"cannot read {path}: it holds no graph, and may have been cut off")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [*_nodes(model.graph), *(node for f in model.functions for node in f.node)]
    layers = tuple(_layer(node, held) for node in nodes if node.op_type == _NORM)
    return State(str(path), layers), _graph(nodes)


_NORM = "BatchNormalization"
_DEEPEST = 64


def _nodes(graph: Any, depth: int = 0) -> Iterator[Any]:
    """Its nodes, and those of the branches and loop bodies that they hold."""
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} graphs inside each other are not read")
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g, depth + 1)
            for inner in attribute.graphs:
                yield from _nodes(inner, depth + 1)


def _layer(node: Any, held: dict[str, Any]) -> LayerState:
    names = [*node.input, *[""] * 5][1:5]
    weight, bias, mean, var = (_tensor(held.get(name)) for name in names)
    eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    return LayerState(
        node.name or next(iter(node.output), node.op_type),
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        eps=eps,
    )


def _tensor(proto: Any | None) -> Tensor | None:
    """An initializer's values; None for one that lies in another file."""
    import onnx

    if proto is None or proto.data_location == onnx.TensorProto.EXTERNAL:
        return None
    try:
        return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
    except Exception:
        return None  # damaged, in any way: of no known type, with fewer values than it says


def _graph(given: list[Any]) -> Graph:
    made: dict[str, Node] = {}
    nodes = []
    for each in given:
        inputs = tuple(made.get(name) for name in each.input)
        for source in inputs:
            if source is not None:
                source.users += 1
        node = Node(each.name or each.op_type, None, inputs, 0, _uses_batch(each))
        nodes.append(node)
        made.update(dict.fromkeys(each.output, node))
    return Graph("ONNX", nodes)


def _uses_batch(node: Any) -> bool | None:
    if node.op_type == _NORM:
        mode = next((a.i for a in node.attribute if a.name == "training_mode"), 0)
        # before opset 14 more outputs than one said so
        return bool(mode) or len([name for name in node.output if name]) > 1
    scopes = next((p.value for p in node.metadata_props if p.key.endswith("class_hierarchy")), "")
    inside = "BatchNorm" in scopes.rpartition(",")[0].rpartition(",")[2]
    return True if node.op_type in _REDUCTIONS and inside else None

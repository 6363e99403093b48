"""Read the order of a model's operations: from its traced graph, or from one pass of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.models.calling import Forward, call
from batchnorm.models.graph import Effect, Graph, Node, is_linear
from batchnorm.models.norms import is_norm
from batchnorm.models.one_pass import graph_of_pass
from batchnorm.models.snapshot import left_as_it_was

__all__ = ["graph_of", "is_hooked"]

_REDUCTIONS = ("mean", "sum", "var", "var_mean", "native_batch_norm")


def graph_of(
    model: nn.Module, batch: Any | None = None, forward: Forward | None = None
) -> Graph | None:
    """The order of a model's operations, by torch.fx; else, with a batch, by one pass forward.

    In that pass hooks say which module computes what, and a dispatch mode sees the operations
    between them. It comes first where `forward` calls the model in a way of its own, which a trace
    of the model does not know. None where neither reads it. The model is left as it was.
    """
    if isinstance(model, fx.GraphModule):
        return _graph(model, model.graph, "its own graph")
    ways: list[Callable[[], Graph]] = [lambda: _traced(model, batch)]
    if batch is not None:
        run = lambda: graph_of_pass(model, batch, forward or call, _is_leaf, effect_of)  # noqa: E731
        ways.insert(1 if forward is None else 0, run)
    for way in ways:
        try:
            return way()
        except Exception:  # noqa: S112 - control flow by values, in as many ways as models
            continue
    return None


def effect_of(module: nn.Module) -> Effect:
    """What a module does to its input, where that is known: in eval mode dropout does nothing."""
    if is_hooked(module) or "forward" in vars(module):
        return "other"
    if type(module) is nn.Identity:
        return "nothing"
    if type(module) in _DROPOUTS and isinstance(module, nn.modules.dropout._DropoutNd):
        return "nothing" if not module.training or module.p == 0 else "other"
    if type(module) is nn.Flatten:
        return "flatten" if (module.start_dim, module.end_dim) == (1, -1) else "other"
    return "other"


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see, or change, what a module is given and gives."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(getattr(module, f"_{kind}") for kind in kinds)


_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is one operation, whoever wrote it, and whatever it is made of."""
    return is_norm(module) or is_linear(module)


class _Tracer(fx.Tracer):
    """What `_is_leaf` means is one operation, and all of `torch.nn`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, batch: Any) -> Graph:
    with left_as_it_was(model):  # a forward that keeps something would keep proxies
        traced = _Tracer().trace(model, concrete_args=_defaults(model, batch))
        return _graph(model, traced, "torch.fx", _kept(model))


def _kept(model: nn.Module) -> list[fx.Node]:
    """The operations whose results a traced forward left in attributes, for somebody to read."""
    values = [value for module in model.modules() for value in vars(module).values()]
    for value in list(values):
        if isinstance(value, (list, tuple, dict)):
            values += value.values() if isinstance(value, dict) else value
    return [value.node for value in values if isinstance(value, fx.Proxy)]


def _defaults(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The arguments that the model is called without: a proxy is never None."""
    given = set(batch) if isinstance(batch, Mapping) else set()
    return {
        name: p.default
        for name, p in inspect.signature(model.forward).parameters.items()
        if name not in given and (p.default is None or type(p.default) in (bool, int, float, str))
    }


def _graph(model: nn.Module, traced: fx.Graph, read_by: str, kept: Iterable[fx.Node] = ()) -> Graph:
    modules = dict(model.named_modules())
    nodes: dict[fx.Node, Node] = {}
    for each in traced.nodes:
        module = modules.get(str(each.target)) if each.op == "call_module" else None
        nodes[each] = Node(
            str(each.target) if module is not None else each.name,
            module,
            () if _asks_for_shape(each) else tuple(nodes[given] for given in _given(each)),
            uses_batch=_uses_batch(each),
            effect=_effect(each) if module is None else effect_of(module),
        )
    taken = [_attribute(model, str(n.target)) for n in traced.nodes if n.op == "get_attr"]
    tensors = [t for t in taken if isinstance(t, Tensor)]
    attributes = Node("an attribute", None, tuple(nodes[each] for each in kept))
    every = [*nodes.values(), *([attributes] if attributes.inputs else [])]
    return Graph(read_by, every, tensors).count_users()


def _given(node: fx.Node) -> list[fx.Node]:
    """What an operation is given, as often as it is; `input=` first, wherever it stands."""
    given: list[fx.Node] = []
    named = sorted(node.kwargs.items(), key=lambda item: item[0] != "input")
    fx.map_arg((node.args, tuple(value for _, value in named)), given.append)
    return given


def _attribute(model: nn.Module, path: str) -> object:
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_SHAPES = ("size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device")
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")


def _asks_for_shape(node: fx.Node) -> bool:
    """Whether it asks what a tensor is, and not for its values."""
    if node.op == "call_method":
        return node.target in _SHAPES
    return node.target is getattr and len(node.args) > 1 and node.args[1] in _ATTRIBUTES


_DROPPING = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


def _effect(node: fx.Node) -> Effect:
    """What a function or a method does to its input, where that is known."""

    def argument(index: int, name: str, default: object) -> object:
        return node.kwargs.get(name, node.args[index] if len(node.args) > index else default)

    if node.target in _DROPPING:
        off = argument(2, "training", node.target is not F.alpha_dropout) is False
        return "nothing" if off else "other"
    if node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten"):
        dims = (argument(1, "start_dim", 0), argument(2, "end_dim", -1))
        return "flatten" if dims == (1, -1) else "other"
    return "other"


def _uses_batch(node: fx.Node) -> bool | None:
    """Whether an exported operation normalizes with the batch; None where it is another."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.partition("::")[2]
    if "batch_norm" in name:
        names = [argument.name for argument in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        # without running statistics it has no other: instance norms become such operations too
        if given.get("running_mean") is None:
            return None
        return bool(given.get("training", given.get("train", False)))
    # this library's layers export as their formula: what reduces inside them computes statistics
    inside: Any = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][1]
    kind = inside if isinstance(inside, str) else getattr(inside, "__qualname__", "")
    return True if "BatchNorm" in kind and name in _REDUCTIONS else None

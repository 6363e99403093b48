"""Read the order of a model's operations: from its traced graph, or from one pass of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.models.calling import Forward, call, with_tensors
from batchnorm.models.graph import Graph, Node
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.models.snapshot import left_as_it_was

__all__ = ["graph_of"]

_REDUCTIONS = ("mean", "sum", "var", "var_mean", "native_batch_norm")


def graph_of(
    model: nn.Module, batch: Any | None = None, forward: Forward | None = None
) -> Graph | None:
    """The order of a model's operations, by torch.fx; else, with a batch, by one pass forward.

    In that pass hooks say which module computed what, and autograd's graph who computed with it.
    None where neither reads it. The model is left as it was.
    """
    if isinstance(model, fx.GraphModule):
        return _graph(model, model.graph, "its own graph")
    try:
        with left_as_it_was(model):  # a forward that keeps something would keep proxies
            traced = _Tracer().trace(model)
        return _graph(model, traced, "torch.fx")
    except Exception:  # control flow that depends on values, in as many ways as there are models
        if batch is None:
            return None
    try:
        return _run(model, batch, forward or call)
    except Exception:
        return None


class _Tracer(fx.Tracer):
    """A batch norm layer is one operation, whoever wrote it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TorchBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module, traced: fx.Graph, read_by: str) -> Graph:
    modules = dict(model.named_modules())
    nodes: dict[fx.Node, Node] = {}
    for each in traced.nodes:
        module = modules.get(str(each.target)) if each.op == "call_module" else None
        nodes[each] = Node(
            str(each.target) if module is not None else each.name,
            module,
            tuple(nodes[given] for given in each.all_input_nodes),
            len(each.users),
            _uses_batch(each),
        )
    return Graph(read_by, list(nodes.values()))


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


def _run(model: nn.Module, batch: Any, forward: Forward) -> Graph:
    """The graph of one pass."""
    paths = {module: path for path, module in model.named_modules()}
    leaves = [m for m in paths if isinstance(m, TorchBatchNorm) or not any(m.children())]
    given: dict[nn.Module, Any] = {}
    nodes: list[tuple[Node, Any]] = []  # with the autograd node of its input
    computed: dict[Any, Node] = {}  # by the autograd node of its output
    roots: list[Any] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        first = inputs[0] if inputs else None
        given[module] = first.grad_fn if isinstance(first, Tensor) else None

    def after(module: nn.Module, inputs: object, output: Any) -> None:
        node = Node(paths[module], module)
        nodes.append((node, given.pop(module, None)))
        if isinstance(output, Tensor) and output.grad_fn is not None:
            computed[output.grad_fn] = node
            roots.append(output.grad_fn)

    def end(output: Tensor) -> Tensor:
        if output.grad_fn is not None:
            roots.append(output.grad_fn)
        return output

    handles = [leaf.register_forward_pre_hook(before) for leaf in leaves]
    handles += [leaf.register_forward_hook(after) for leaf in leaves]
    try:
        with left_as_it_was(model), torch.enable_grad():
            with_tensors(forward(model, with_tensors(batch, _differentiable)), end)
    finally:
        for handle in handles:
            handle.remove()
    users = _users(roots)
    for node, source in nodes:
        node.inputs = (computed.get(source),)
    for gradient, node in computed.items():
        node.users = users[gradient]
    return Graph("autograd and hooks", [node for node, _ in nodes])


def _differentiable(tensor: Tensor) -> Tensor:
    floating = tensor.is_floating_point()
    return tensor.detach().clone().requires_grad_() if floating else tensor


def _users(roots: list[Any]) -> Counter[Any]:
    """How many operations of the autograd graph compute with what each of them gives."""
    users: Counter[Any] = Counter()
    seen, ahead = set(roots), list(dict.fromkeys(roots))
    while ahead:
        for source, _ in ahead.pop().next_functions:
            if source is None:
                continue
            users[source] += 1
            if source not in seen:
                seen.add(source)
                ahead.append(source)
    return users

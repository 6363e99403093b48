"""Read the order of a model's operations from one pass: what nobody can trace, anybody can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.models.calling import Forward, copied, tensors_of
from batchnorm.models.graph import Effect, Graph, Node
from batchnorm.models.snapshot import left_as_it_was

__all__ = ["BY_HOOKS", "graph_of_pass"]

BY_HOOKS = "hooks on one pass"
"""What such a graph says that it was read by."""

aten = torch.ops.aten


def graph_of_pass(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    is_leaf: Callable[[nn.Module], bool],
    effect_of: Callable[[nn.Module], Effect],
) -> Graph:
    """The operations of one pass, in eval or in training mode as the model is.

    A module is one operation where `is_leaf` says so or it has no children; what happens inside of
    it is its own. What is still alive when the pass is over somebody keeps: the model returns it,
    or remembers it. The model is left as it was.
    """
    watched = _Pass(model)
    leaves = [m for m in model.modules() if is_leaf(m) or not any(m.children())]
    effects = {leaf: effect_of(leaf) for leaf in leaves}  # before there are hooks of ours
    given = copied(batch)
    with left_as_it_was(model), watched:  # which takes the hooks off, too
        for leaf, effect in effects.items():
            watched.watch(leaf, effect)
        result = forward(model, given)
        del given  # ours, and not kept by the model
        watched.end()
        del result
    return Graph(BY_HOOKS, watched.nodes, watched.taken).count_users()


class _Pass(TorchDispatchMode):
    """Notes each operation outside of the leaves, and each call of a leaf."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.taken: list[Tensor] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._owned = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._made_by: Any = WeakTensorKeyDictionary()  # the operation that gave a tensor
        self._inside: list[tuple[Node | None, ...]] = []  # the leaves' inputs, innermost last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            given = tensors_of((args, kwargs or {}))
            self.taken += [t for t in given if id(t) in self._owned]
            node = Node(func.overloadpacket.__name__, None, self._makers(given))
            node.effect = _effect(func, given, result)
            changed = given if func._schema.is_mutable else []
            self._note(node, [*changed, *tensors_of(result)])
        return result

    def watch(self, leaf: nn.Module, effect: Effect) -> None:
        """Note the calls of a module as one operation each."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            named = sorted(kwargs.items(), key=lambda item: item[0] != "input")
            # now, for the module may work in place
            self._inside.append(self._makers(tensors_of((args, [value for _, value in named]))))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = self._inside.pop()
            if not self._inside:
                node = Node(self._paths[module], module, inputs, effect=effect)
                self._note(node, tensors_of(output))

        leaf.register_forward_pre_hook(before, with_kwargs=True)
        leaf.register_forward_hook(after, with_kwargs=True, always_call=True)

    def end(self) -> None:
        """Note what is alive, which somebody has use for."""
        self.nodes.append(Node("output", None, tuple(self._made_by.values())))

    def _makers(self, tensors: list[Tensor]) -> tuple[Node | None, ...]:
        return tuple(self._made_by.get(tensor) for tensor in tensors)

    def _note(self, node: Node, made: list[Tensor]) -> None:
        self.nodes.append(node)
        for tensor in made:
            self._made_by[tensor] = node


def _effect(func: Any, given: list[Tensor], result: Any) -> Effect:
    if func in (aten.detach.default, aten.alias.default):
        return "nothing"
    if func in (aten.view.default, aten._unsafe_view.default) and isinstance(result, Tensor):
        rows = given[0].shape[:1]
        return "flatten" if result.shape == (*rows, given[0].shape[1:].numel()) else "other"
    return "other"

"""What computes with what in a model, in training and in eval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.calling import Forward
from batchnorm.models.graph import Graph, Node
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.models.tracing import graph_of

__all__ = ["Call", "Order", "is_lazy_model"]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module, and what computes with its output."""

    node: Node
    consumers: tuple[Node, ...]

    @property
    def consumer(self) -> Node | None:
        """The one operation that computes with the output; None where it is not one module."""
        if self.node.users == 1 and len(self.consumers) == 1 and self.consumers[0].module:
            return self.consumers[0]
        return None

    @property
    def all_are_known(self) -> bool:
        """Whether every operation that computes with the output is a module's."""
        modules = [node for node in self.consumers if node.module is not None]
        return len(modules) == self.node.users > 0

    @property
    def taken_by(self) -> str:
        """What takes the output, in words."""
        if self.node.users > 1:
            return "several operations take its output"
        others = [node.name for node in self.consumers if node.module is None]
        return f"{others[0] if others else 'nothing'} takes its output, which is no module"


class Order:
    """A model's operations, as far as its graphs in training and in eval mode tell.

    Raises `ValueError` where neither can be read.
    """

    def __init__(self, model: nn.Module, example: Any, forward: Forward | None) -> None:
        self._calls: dict[nn.Module, list[Call]] = {}
        self._taken: list[Tensor] = []
        graphs = [self._read(model, mode, example, forward) for mode in (False, True)]
        if not any(graphs):
            raise ValueError(
                "the order of the model's operations can be read neither by torch.fx nor in a pass "
                + ("of the example" if example is not None else "forward; pass example=...")
            )
        self.uncalled = {
            module
            for module in model.modules()
            if isinstance(module, TorchBatchNorm) and module not in self._calls
        }

    def calls(self, module: nn.Module) -> list[Call]:
        """The calls of a module."""
        return self._calls.get(module, [])

    def takes(self, tensor: Tensor) -> bool:
        """Whether an operation computes with a tensor outside of its module."""
        return any(tensor is each for each in self._taken)

    def _read(
        self, model: nn.Module, training: bool, example: Any, forward: Forward | None
    ) -> Graph | None:
        with left_as_it_was(model):
            model.train(training)
            # a pass would make a lazy layer an ordinary one
            graph = graph_of(model, None if is_lazy_model(model) else example, forward)
        if graph is not None:
            self._taken += graph.taken
            for node, consumers in graph.consumers().items():
                if node.module is not None:
                    self._calls.setdefault(node.module, []).append(Call(node, tuple(consumers)))
        return graph


def is_lazy_model(model: nn.Module) -> bool:
    """Whether a layer of the model waits for its first batch."""
    tensors: Iterable[Any] = (*model.parameters(), *model.buffers())
    return any(is_lazy(tensor) for tensor in tensors)

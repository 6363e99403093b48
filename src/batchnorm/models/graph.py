"""The order of a model's operations, as the rules and the repairs see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from batchnorm.models.norms import TorchBatchNorm

__all__ = ["Effect", "Graph", "Node", "is_linear"]

Effect = Literal["nothing", "flatten", "other"]
"""What an operation does: give what it is given, make one dimension of all but the first, else."""


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is a convolution, a transposed one, or a linear layer, or a subclass of one."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


@dataclass(eq=False)
class Node:
    """One operation; several where a module is called several times.

    - `name`: the module's path, or what the graph calls the operation.
    - `module`: the module that computes it, where one does.
    - `inputs`: what it computes with, its `input` first; None for what is not known.
    - `users`: how often others compute with what it gives; what the model returns counts.
    - `uses_batch`: whether it normalizes with the batch; None where a module's mode tells it.
    - `effect`: what it does to its input, where that is known.
    """

    name: str
    module: nn.Module | None = None
    inputs: tuple[Node | None, ...] = ()
    users: int = 0
    uses_batch: bool | None = None
    effect: Effect = "other"

    @property
    def is_norm(self) -> bool:
        """Whether it normalizes."""
        return isinstance(self.module, TorchBatchNorm) or self.uses_batch is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is a convolution or a linear layer."""
        return is_linear(self.module)

    @property
    def source(self) -> Node | None:
        """What gave the first input."""
        return self.inputs[0] if self.inputs else None


@dataclass(eq=False)
class Graph:
    """The operations of a model.

    - `read_by`: what read them, for the report: `torch.fx`, `hooks on one pass`, `ONNX`.
    - `nodes`: in the order in which they run.
    - `taken`: parameters and buffers that operations compute with outside of their modules.
    """

    read_by: str
    nodes: list[Node] = field(default_factory=list)
    taken: list[Tensor] = field(default_factory=list)

    def norms(self) -> Iterator[tuple[Node, TorchBatchNorm]]:
        """The calls of batch norm layers."""
        for node in self.nodes:
            if isinstance(node.module, TorchBatchNorm):
                yield node, node.module

    def feeds(self, module: nn.Module) -> set[TorchBatchNorm]:
        """The batch norms that take a module's output."""
        fed = ((node.source, norm) for node, norm in self.norms())
        return {norm for source, norm in fed if source is not None and source.module is module}

    def calls(self, module: nn.Module) -> int:
        """How often a module is called."""
        return sum(node.module is module for node in self.nodes)

    def consumers(self) -> dict[Node, list[Node]]:
        """What computes with each operation's output, as often as it does."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                if source is not None:
                    found[source].append(node)
        return found

    def count_users(self) -> Graph:
        """Set `users` by the inputs of all. Returns the graph."""
        for node, consumers in self.consumers().items():
            node.users = len(consumers)
        return self

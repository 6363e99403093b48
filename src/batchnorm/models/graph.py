"""The order of a model's operations, as the rules see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from batchnorm.models.norms import TorchBatchNorm

__all__ = ["Graph", "Node"]


@dataclass(eq=False)
class Node:
    """One operation; several where a module is called several times.

    - `name`: the module's path, or what the graph calls the operation.
    - `module`: the module that computes it, where one does.
    - `inputs`: what it computes with; None for what is not known.
    - `users`: how many operations compute with what it gives.
    - `uses_batch`: whether it normalizes with the batch; None where a module's mode tells it.
    """

    name: str
    module: nn.Module | None = None
    inputs: tuple[Node | None, ...] = ()
    users: int = 0
    uses_batch: bool | None = None

    @property
    def is_norm(self) -> bool:
        """Whether it normalizes."""
        return isinstance(self.module, TorchBatchNorm) or self.uses_batch is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is a convolution or a linear layer."""
        return isinstance(self.module, (nn.modules.conv._ConvNd, nn.Linear))

    @property
    def source(self) -> Node | None:
        """What gave the first input."""
        return self.inputs[0] if self.inputs else None


@dataclass(eq=False)
class Graph:
    """The operations of a model.

    - `read_by`: what read them, for the report: `torch.fx`, `autograd and hooks`, `ONNX`.
    """

    read_by: str
    nodes: list[Node] = field(default_factory=list)

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

"""Batch norm and the activation behind it, as one layer; and two again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from batchnorm.kernels import IDENTITY, Activation
from batchnorm.models.graph import Node
from batchnorm.models.tracing import is_hooked
from batchnorm.repair.conversion.form import Form, fresh
from batchnorm.repair.conversion.order import Order
from batchnorm.repair.conversion.source import FUSED, MEMORY, Refused, Source

__all__ = ["Fusion", "fused_activation", "groups", "unfused_activation"]


@dataclass(frozen=True)
class Fusion:
    """Which norms take over which activations.

    - `activations`: those behind each norm, of which there are several where it is called several
      times.
    - `refused`: why a norm takes over none.
    """

    activations: dict[nn.Module, tuple[nn.Module, ...]] = field(default_factory=dict)
    refused: dict[nn.Module, str] = field(default_factory=dict)

    @classmethod
    def of(cls, order: Order, norms: Mapping[nn.Module, Source]) -> Fusion:
        """The activations that take nothing but these norms' outputs, which nothing else takes."""
        found: dict[nn.Module, tuple[nn.Module, ...]] = {}
        refused: dict[nn.Module, str] = {}
        for norm, source in norms.items():
            try:
                found[norm] = _behind(order, norm, source)
            except Refused as reason:
                refused[norm] = str(reason)
        # what one shares with a norm that is refused, another cannot take over either
        while lost := {n for n, acts in found.items() if not _are_theirs(order, acts, found)}:
            for norm in lost:
                acts = found.pop(norm)
                refused[norm] = f"{_name(order, acts[0])} takes other outputs too"
        return cls(found, refused)

    def norms(self, activation: nn.Module) -> tuple[nn.Module, ...]:
        """The norms that take over an activation."""
        return tuple(norm for norm, acts in self.activations.items() if activation in acts)

    def all_activations(self) -> dict[nn.Module, None]:
        """The activations that are taken over, each once."""
        return {act: None for acts in self.activations.values() for act in acts}


def fused_activation(activation: nn.Module, norms: tuple[nn.Module, ...]) -> tuple[Form, Form]:
    """What an activation is, and the identity that it becomes where norms do its work."""
    now = Form.of(activation, fresh(type(activation)))
    return now, Form(nn.Identity, {MEMORY: now, FUSED: norms})


def unfused_activation(identity: nn.Module) -> tuple[Form, Form]:
    """The identity that an activation became, and the activation."""
    now = Form.of(identity, Form(nn.Identity, {MEMORY: None, FUSED: ()}))
    activation: Form = now.settings[MEMORY]
    return now, activation


def groups(norms: Mapping[nn.Module, Source]) -> Iterator[tuple[set[nn.Module], set[nn.Module]]]:
    """The activations that norms have taken over, with all norms that have: together or not."""
    left = [norm for norm in norms if FUSED in vars(norm)]
    while left:
        acts: set[nn.Module] = set()
        ahead, members = [left[0]], {left[0]}
        while ahead:
            for act in vars(ahead.pop()).get(FUSED, ()):
                acts.add(act)
                new = set(vars(act).get(FUSED, ())) - members
                members |= new
                ahead += new
        yield acts, members
        left = [norm for norm in left if norm not in members]


def _behind(order: Order, norm: nn.Module, source: Source) -> tuple[nn.Module, ...]:
    """The activations behind a norm, one of which takes each of its outputs."""
    calls = order.calls(norm)
    if source.act != IDENTITY:
        raise Refused(f"it has its activation, {source.act}")
    if not calls:
        raise Refused("the model does not call it in what can be read of it")
    if order.uncalled:
        raise Refused("the model has norms that it calls at other times, perhaps in its place")
    if norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        raise Refused("it has hooks, which would see the activation's output")
    behind: dict[nn.Module, Activation] = {}
    for call in calls:
        consumer = call.consumer
        if consumer is None:
            raise Refused(call.taken_by)
        activation = _checked(consumer)
        behind[activation] = Activation.of(activation)
    if len(set(behind.values())) > 1:
        raise Refused(f"different activations follow it: {', '.join(map(str, behind.values()))}")
    return tuple(behind)


def _checked(consumer: Node) -> nn.Module:
    """The module of a call, if it is an activation that can be fused."""
    module = consumer.module
    assert module is not None
    try:
        activation = Activation.of(module)
    except ValueError:
        activation = IDENTITY
    if activation == IDENTITY:
        raise Refused(f"{type(module).__name__} follows it, no activation that can be fused")
    if is_hooked(module) or "forward" in vars(module):
        raise Refused(f"{consumer.name} has hooks or a forward of its own")
    return module


def _are_theirs(
    order: Order,
    activations: tuple[nn.Module, ...],
    found: Mapping[nn.Module, tuple[nn.Module, ...]],
) -> bool:
    """Whether activations take only the outputs of norms that take them over."""
    sources = [call.node.source for act in activations for call in order.calls(act)]
    return all(node is not None and node.module in found for node in sources)


def _name(order: Order, module: nn.Module) -> str:
    return order.calls(module)[0].node.name

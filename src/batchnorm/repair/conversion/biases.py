"""Biases that the batch norm behind them takes out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.graph import Node
from batchnorm.models.norms import is_norm
from batchnorm.repair.conversion.order import Call, Order
from batchnorm.repair.conversion.source import Refused, understood

__all__ = ["biased", "cancelling", "drop_bias", "is_before_norm", "is_dropped"]

_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip


def biased(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer with a bias."""
    linear = isinstance(module, (*_CONVOLUTIONS, nn.Linear))
    return linear and getattr(module, "bias", None) is not None


def cancelling(
    order: Order, layer: nn.Module, shapes: Mapping[nn.Module, Sequence[torch.Size]] | None
) -> tuple[nn.Module, ...]:
    """The batch norms that take out a layer's bias; raises `Refused` where something else sees it.

    In training the batch's mean takes the bias along, in eval the running mean has it.

    - `shapes`: of the norms' inputs, where an example tells.
    """
    bias = layer._parameters.get("bias")
    calls = order.calls(layer)
    if bias is None or not _is_plain(layer):
        raise Refused("it computes its bias, or uses it in a way of its own")
    if is_lazy(bias):
        raise Refused("it is lazy; run a first batch, then convert")
    if not calls:
        raise Refused("the model does not call it in what can be read of it")
    if order.takes(bias):
        raise Refused("something else computes with its bias")
    if layer._forward_hooks:
        raise Refused("it has hooks, which would see its output")
    if not bias.is_meta and not bias.isfinite().all():
        raise Refused("its bias is not finite")
    norms = {_norm(call, consumer): None for call in calls for consumer in _consumers(call)}
    for norm in norms:
        _check_cancels(order, layer, bias, norm, None if shapes is None else shapes.get(norm, ()))
    return tuple(norms)


def is_before_norm(order: Order, layer: nn.Module) -> bool:
    """Whether a batch norm takes a layer's output, be it with others; True where none is known."""
    consumers = [node.module for call in order.calls(layer) for node in call.consumers]
    return not consumers or any(module is not None and is_norm(module) for module in consumers)


@torch.inference_mode(False)  # where no mean could be tracked that is made
def drop_bias(layer: nn.Module, norms: Sequence[nn.Module], undo: ExitStack) -> None:
    """Take a layer's bias out, and out of the running means of the norms behind it."""
    bias = layer.bias
    assert isinstance(bias, nn.Parameter)
    for norm in norms:
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        moved = (_wide(mean) - _wide(bias.detach())).to(mean.dtype)
        undo.callback(_put_back(norm, mean, moved, bias))
        norm.running_mean = moved
    undo.callback(setattr, layer, "bias", bias)
    layer.bias = None  # type: ignore[assignment]


def is_dropped(layer: nn.Module, norms: Sequence[nn.Module]) -> bool:
    """Whether the bias can be put back: the layer has none still, and the norms have means."""
    means = [norm._buffers.get("running_mean") for norm in norms]
    return layer._parameters.get("bias") is None and all(mean is not None for mean in means)


def _put_back(norm: nn.Module, mean: Tensor, moved: Tensor, bias: Tensor) -> Callable[[], None]:
    first = moved.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_back() -> None:
        now = norm.running_mean
        assert isinstance(now, Tensor)
        if torch.equal(now.to(first), first):  # adding the bias again would round
            norm.running_mean = mean.to(now.device)
        else:
            norm.running_mean = (_wide(now) + _wide(bias.to(now.device))).to(now.dtype)

    return put_back


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer adds its bias as torch.nn's does."""
    own = getattr(layer.forward, "__func__", None)
    return any(own is getattr(kind, "forward", None) for kind in (*_CONVOLUTIONS, nn.Linear))


def _consumers(call: Call) -> tuple[Node, ...]:
    if not call.all_are_known:
        raise Refused(call.taken_by)
    return call.consumers


def _norm(call: Call, consumer: Node) -> nn.Module:
    assert consumer.module is not None
    if not is_norm(consumer.module):
        raise Refused(f"{consumer.name} takes its output, no batch norm")
    if consumer.inputs != (call.node,):
        raise Refused(f"{consumer.name} takes its output as more than its input")
    return consumer.module


def _check_cancels(
    order: Order,
    layer: nn.Module,
    bias: Tensor,
    norm: nn.Module,
    shapes: Sequence[torch.Size] | None,
) -> None:
    """Raise `Refused` unless a norm is sure to take out the bias."""
    name = order.calls(norm)[0].node.name
    try:
        source = understood(norm)
        source.check_not_lazy()
    except Refused as reason:
        raise Refused(f"of {name} behind it: {reason}") from None
    if norm._forward_pre_hooks:
        raise Refused(f"{name} has hooks, which would see its input")
    if any(not _is_call_of(call.node.source, layer) for call in order.calls(norm)):
        raise Refused(f"{name} normalizes other outputs too")
    # of a linear layer (n, channels) alone: (n, length, features) has them elsewhere
    dims = next((d for kind, d in _CONVOLUTIONS.items() if isinstance(layer, kind)), 0)
    if dims == 0 and not shapes:
        raise Refused(f"{name} may normalize another dimension; pass example=... that tells")
    elsewhere = any(shape != dims + 2 for shape in map(len, shapes or ()))
    elsewhere |= source.dims is not None and source.dims != max(dims, 1)
    if elsewhere or source.form.channels != len(bias):
        raise Refused(f"{name} normalizes another dimension than the bias is added along")
    if any(_channels(other) == len(bias) for other in order.uncalled):
        raise Refused("the model has norms that it calls at other times, perhaps behind it")


def _is_call_of(node: Node | None, layer: nn.Module) -> bool:
    return node is not None and node.module is layer


def _channels(norm: nn.Module) -> int | None:
    try:
        return understood(norm).form.channels
    except Refused:
        return getattr(norm, "num_features", None)

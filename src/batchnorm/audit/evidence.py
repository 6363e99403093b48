"""What batches do in a model: what every batch norm layer is given, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.audit.call import TorchBatchNorm
from batchnorm.moments import Moments

__all__ = ["Evidence", "Forward", "LayerEvidence", "gather"]

Forward = Callable[[nn.Module, Any], Any]
"""How to call a model with a batch."""


@dataclass(eq=False)
class LayerEvidence:
    """What one layer was given while the model computed in training mode.

    - `running`: copies of its running mean and variance, as they were before.
    - `is_frozen`: whether it was in eval mode while the model trained.
    - `batches`: the moments of its input, a forward pass each.
    - `sample_means`: of each sample, its mean over the positions: (n, c), a forward pass each.
    """

    path: str
    layer: TorchBatchNorm
    running: tuple[Tensor, Tensor] | None
    is_frozen: bool
    batches: list[Moments] = field(default_factory=list)
    sample_means: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Evidence:
    """What a model's layers were given by some batches, in the order of their first calls.

    - `uncalled`: paths of layers that no batch reached.
    - `companions`: how much, in eval mode, the outputs of half a batch change when the other half
      is taken away, as a part of the largest output; None where a batch cannot be cut in two.
    """

    layers: list[LayerEvidence]
    uncalled: list[str]
    batches: int
    companions: float | None = None


def gather(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, limit: int = 32
) -> Evidence:
    """Run up to `limit` batches through the model, and leave it exactly as it was.

    In training mode, without gradients and with dropout off; modules that were put into eval in
    a model that trains stay there. Modes, buffers, random state and gradients are put back, also
    where the model raises.

    Raises what the model raises, and `ValueError` where there are no batches.
    """
    forward = forward or _call
    names = {m: path for path, m in model.named_modules() if isinstance(m, TorchBatchNorm)}
    seen: dict[nn.Module, LayerEvidence] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, TorchBatchNorm)
        x = inputs[0]
        if layer not in seen:
            seen[layer] = LayerEvidence(names[layer], layer, before[layer], not layer.training)
        x = _copy(x)  # the model may go on to change it in place
        seen[layer].batches.append(Moments.of(x, (0, *range(2, x.ndim))))
        seen[layer].sample_means.append(x.flatten(2).mean(2) if x.ndim > 2 else x)

    count, first = 0, None
    with _left_as_it_was(model):
        before = {layer: _copies(layer.running_mean, layer.running_var) for layer in names}
        hooks = [layer.register_forward_pre_hook(note) for layer in names]
        try:
            _set_training(model)
            for batch in islice(batches, limit):
                first = batch if first is None else first
                forward(model, batch)
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if count == 0:
        raise ValueError("there are no batches to look at; the iterable was empty")
    uncalled = [names[layer] for layer in names if layer not in seen]
    evidence = Evidence(list(seen.values()), uncalled, count)
    with _left_as_it_was(model):
        evidence.companions = _companions(model.eval(), first, forward)
    return evidence


def _call(model: nn.Module, batch: Any) -> Any:
    """As trainers do: a dictionary by name, of a tuple or list the first entry, else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return model(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _set_training(model: nn.Module) -> None:
    """Training mode where nobody chose otherwise, and dropout off."""
    if not any(module.training for module in model.modules()):
        model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and random state back, whatever happens; record no gradients."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if not is_lazy(b)}
    devices = sorted({b.device.index or 0 for b in model.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _companions(model: nn.Module, batch: Any, forward: Forward) -> float | None:
    """How much the first half's outputs change when the other half is taken away."""
    try:
        together, alone = _output(forward(model, batch)), _output(forward(model, _half(batch)))
    except Exception:
        return None  # it may be called with whole batches alone
    if together is None or alone is None or len(alone) != len(together) // 2 or not len(alone):
        return None
    difference = (together[: len(alone)].double() - alone.double()).abs().max()
    return float(difference / together.double().abs().max().clamp(min=1e-30))


def _half(batch: Any) -> Any:
    """The first half of a batch."""
    if isinstance(batch, Tensor):
        return batch[: len(batch) // 2] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _half(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_half(value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: _half(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **values)
    return batch


def _output(result: Any) -> Tensor | None:
    """The first tensor of what a model returns."""
    if isinstance(result, Tensor):
        return result if result.ndim and result.is_floating_point() else None
    values = result.values() if isinstance(result, Mapping) else result
    if isinstance(values, (tuple, list)) or isinstance(result, Mapping):
        return next((t for value in values if (t := _output(value)) is not None), None)
    return None


def _copies(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Of running statistics, on the CPU in float64, as moments are compared."""
    return None if mean is None or var is None else (_copy(mean), _copy(var))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64, copy=True)

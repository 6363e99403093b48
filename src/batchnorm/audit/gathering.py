"""Run batches through a model, and see what each of its batch norm layers is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from batchnorm.audit.call import policy_of
from batchnorm.audit.evidence import Evidence, LayerEvidence, Losses, Origin
from batchnorm.audit.features import features
from batchnorm.audit.leakage import leakage
from batchnorm.audit.profile import GradientNorm
from batchnorm.audit.synchronizing import ask_nobody, is_sharded
from batchnorm.models.calling import (
    Forward,
    call,
    half,
    output_of,
    set_training,
)
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.moments import Moments
from batchnorm.statistics import Renorm

__all__ = ["LIMIT", "Loss", "Mask", "NoBatchesError", "gather", "label_loss"]


class NoBatchesError(ValueError):
    """An iterable of batches had none."""


LIMIT = 32  # batches looked at
WITH_GRADIENTS = 8  # of them run backward too

Loss = Callable[[Any, Any], Tensor]
"""The loss of what the model answers to a batch: `loss(output, batch)`."""

Mask = Callable[[Any], Tensor]
"""Where a batch holds data and no padding: (n, *positions), true for data."""


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    loss: Loss | None = None,
    mask: Mask | None = None,
    deploy: Iterable[Any] | None = None,
    limit: int = LIMIT,
) -> Evidence:
    """Run up to `limit` batches through the model, and leave it exactly as it was.

    In training mode and without gradients; modules that were put into eval in a model that trains
    stay there. Modes, buffers, random state and gradients are put back, also
    where the model raises. With a loss, the batches are run in eval mode too, and some of them
    backward; those of `deploy` are run in eval mode. Where layers synchronize, all of their ranks
    must call this, with as many batches each. Of a model of which ranks hold a part each, nothing
    is tried that asks for passes of one rank alone: companions and leakage are not known.

    Raises what the model raises, and `ValueError` where there are no batches.
    """
    forward = forward or call
    with left_as_it_was(model):  # a loader draws random numbers
        batches = list(islice(batches, limit))
        deployed = [] if deploy is None else list(islice(deploy, limit))
    if not batches:
        raise NoBatchesError("there are no batches to look at; the iterable was empty")
    if deploy is not None and not deployed:
        raise NoBatchesError("there are no batches of deployment to look at; it was empty")
    layers = _Layers(model)
    evidence = Evidence([], len(batches))
    with left_as_it_was(model):
        set_training(model)
        layers.see_modes()
        trained = []
        for batch in batches:
            layers.mask = None if mask is None else mask(batch)
            with layers.watched(layers.note), _given(model, layers.note_samples):
                trained.append(_lost(loss, forward(model, batch), batch))
    if not is_sharded(model):  # what is tried depends on the data, which ranks have their own of
        with left_as_it_was(model):
            evidence.companions = _companions(model.eval(), batches[0], forward)
        with left_as_it_was(model):
            ask_nobody(model)
            evidence.leakage = leakage(model, batches[0], forward)
    if loss is not None:
        with left_as_it_was(model):
            model.eval()
            lost = [_lost(loss, forward(model, batch), batch) for batch in batches]
        evidence.losses = Losses(trained, lost)
        for step, batch in enumerate(batches[:WITH_GRADIENTS]):
            with left_as_it_was(model), torch.enable_grad():
                set_training(model)
                layers.differentiate(step, partial(_loss_of, model, batch, forward, loss))
    with left_as_it_was(model), layers.watched(layers.note_deployed):
        model.eval()
        for batch in deployed:
            forward(model, batch)
    evidence.layers = list(layers.seen.values())
    evidence.uncalled = [path for layer, path in layers.paths.items() if layer not in layers.seen]
    if evidence.layers:
        evidence.samples = {evidence.layers[0].path: layers.samples}
    return evidence


def label_loss(output: Any, batch: Any) -> Tensor:
    """Cross entropy for labels that are integers, else the mean squared error.

    `batch` is a tuple or list of which the second entry is the label, or a mapping with `label`,
    `labels`, `target` or `y`.

    Raises `ValueError` where there is none.
    """
    label = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    elif hasattr(batch, "get"):
        label = next((batch[n] for n in ("label", "labels", "target", "y") if n in batch), None)
    answer = output_of(output)
    if not isinstance(label, Tensor) or answer is None:
        raise ValueError(
            f"a batch with labels is (input, label) or has one by name; got {type(batch).__name__} "
            "without a tensor for it, or an output without numbers; give `loss`"
        )
    if label.is_floating_point():
        return F.mse_loss(answer, label.to(answer.dtype))
    return F.cross_entropy(answer, label)


class _Layers:
    """The batch norm layers of a model, and what was seen of each."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {m: path for path, m in model.named_modules() if isinstance(m, TorchBatchNorm)}
        self.seen: dict[nn.Module, LayerEvidence] = {}
        self.samples: list[Tensor] = []
        self.mask: Tensor | None = None
        self._calls: dict[nn.Module, int] = {}  # in the forward pass under way
        self._passes = 0
        self._running = {m: _copies(m.running_mean, m.running_var) for m in self.paths}
        self._new = {m: _is_new(m) for m in self.paths}
        self._frozen: dict[nn.Module, bool] = {}

    def see_modes(self) -> None:
        """Note which layers are in eval mode while the model trains."""
        self._frozen = {layer: not layer.training for layer in self.paths}

    def watched(
        self, note: Callable[[TorchBatchNorm, Tensor, Tensor | None], None]
    ) -> AbstractContextManager[None]:
        """Have every layer's input noted while the context is open, with a mask given to it."""

        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            assert isinstance(layer, TorchBatchNorm)
            x = inputs[0] if inputs else named.get("input")
            if isinstance(x, Tensor) and x.ndim >= 2:
                note(layer, x, _mask_of(x, named.get("mask")))

        self._calls.clear()
        self._passes += 1
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.paths]
        return _removed(hooks)

    def note(self, layer: TorchBatchNorm, x: Tensor, mask: Tensor | None) -> None:
        """What the layer is given in training."""
        x = _copy(x)  # the model may go on to change it in place
        own, moments = self._of(layer, x), _moments(x, mask)
        own.batches.append(moments)
        number = self._calls[layer] = self._calls.get(layer, 0) + 1
        origin = own.origins.setdefault(f"call {number} of a pass", Origin())
        origin.batches.append(moments)
        origin.passes.append(self._passes)
        if self.mask is not None and (mask := _resized(self.mask, x)) is not None:
            own.masked.append(Moments.of(x, (0, *range(2, x.ndim)), mask=mask))

    def note_samples(self, x: Tensor) -> None:
        """What the model itself is given."""
        seen = features(x)
        if seen is not None and (not self.samples or self.samples[0].shape[1] == seen.shape[1]):
            self.samples.append(seen.double().cpu())

    def note_deployed(self, layer: TorchBatchNorm, x: Tensor, mask: Tensor | None) -> None:
        """What the layer is given where the model is deployed."""
        self._of(layer, x).deployed.append(_moments(_copy(x), mask))

    def differentiate(self, step: int, loss: Callable[[], Tensor]) -> None:
        """Note the norm of the loss's gradient by each layer's output; no `.grad` is written."""
        outputs: dict[nn.Module, GradientEdge] = {}

        def hook(layer: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                # the output as it is now: the model may go on to change it in place
                outputs[layer] = get_gradient_edge(output)

        with _removed([layer.register_forward_hook(hook) for layer in self.paths]):
            value = loss()
        if not outputs or not value.requires_grad:
            return
        given = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
        for layer, gradient in zip(outputs, given, strict=True):
            if gradient is not None and layer in self.seen:
                norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
                self.seen[layer].gradients.append(GradientNorm(step, norm))

    def _of(self, layer: TorchBatchNorm, x: Tensor) -> LayerEvidence:
        if layer not in self.seen:
            learns = [p for p in (layer.weight, layer.bias) if p is not None]
            self.seen[layer] = LayerEvidence(
                self.paths[layer],
                eps=layer.eps,
                momentum=layer.momentum,
                channels=x.shape[1],
                weight=None if layer.weight is None else _copy(layer.weight.detach()),
                running=self._running[layer],
                is_frozen=self._frozen.get(layer, False),
                is_new=self._new[layer],
                mixes_in_eval=layer.running_mean is None,
                learns=not learns or any(p.requires_grad for p in learns),
                is_corrected=isinstance(policy_of(layer), Renorm),
            )
        return self.seen[layer]


def _is_new(layer: TorchBatchNorm) -> bool:
    """Whether it was never trained; statistics that were ported may come without their count."""
    mean, var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or is_lazy(mean) or (batches is not None and batches != 0):
        return False
    return bool((mean == 0).all() & (var == 1).all())


def _given(model: nn.Module, note: Callable[[Tensor], None]) -> AbstractContextManager[None]:
    """Have the first tensor that the model is given noted while the context is open."""

    def hook(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
        if tensors:
            note(tensors[0])

    return _removed([model.register_forward_pre_hook(hook, with_kwargs=True)])


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there while the context is open."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss_of(model: nn.Module, batch: Any, forward: Forward, loss: Loss) -> Tensor:
    return loss(forward(model, batch), batch)


def _lost(loss: Loss | None, output: Any, batch: Any) -> float:
    return math.nan if loss is None else float(loss(output, batch))


def _companions(model: nn.Module, batch: Any, forward: Forward) -> float | None:
    """How much the first half's outputs change when the other half is taken away."""
    try:
        together, alone = output_of(forward(model, batch)), output_of(forward(model, half(batch)))
    except Exception:
        return None  # it may be called with whole batches alone
    if together is None or alone is None or len(alone) != len(together) // 2 or not len(alone):
        return None
    if together.shape[1:] != alone.shape[1:]:
        return None  # each sample is answered beside the others, as contrastive models do
    difference = (together[: len(alone)].double() - alone.double()).abs().max()
    return float(difference / together.double().abs().max().clamp(min=1e-30))


def _resized(mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask at the layer's resolution, (n, 1, *positions); None where it does not fit.

    Strided layers have every so many positions of the input; theirs are the nearest of the mask.
    """
    if mask.ndim != x.ndim - 1 or len(mask) != len(x) or x.ndim < 3:
        return None
    there = mask.to("cpu", torch.float32).unsqueeze(1)
    if there.shape[2:] != x.shape[2:]:
        there = F.interpolate(there, size=x.shape[2:], mode="nearest")
    return there > 0.5


def _mask_of(x: Tensor, mask: object) -> Tensor | None:
    """A mask that a layer is called with, (n, 1, *positions); a wrong one is for it to refuse."""
    if not isinstance(mask, Tensor) or mask.shape != (x.shape[0], *x.shape[2:]):
        return None
    return mask.to("cpu", torch.bool, copy=True).unsqueeze(1)


def _moments(x: Tensor, mask: Tensor | None) -> Moments:
    """Of what the layer averages over: where it is given a mask, of the data alone."""
    return Moments.of(x, (0, *range(2, x.ndim)), mask=mask)


def _copies(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Of running statistics, as moments are compared."""
    if mean is None or var is None or is_lazy(mean):
        return None
    return _copy(mean), _copy(var)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64, copy=True)

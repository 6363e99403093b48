"""What is remembered of one layer in a training run."""

from __future__ import annotations

from collections import Counter, deque
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import unserializable_hook

from batchnorm.audit.call import Call, batches_version
from batchnorm.audit.evidence import LayerEvidence, Origin
from batchnorm.audit.model_history import ModelHistory
from batchnorm.audit.profile import GradientNorm
from batchnorm.audit.rank_view import LayerView, Statistics, digest, name_of, told
from batchnorm.audit.update import Direct, Update, direct
from batchnorm.layers import BatchNorm
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.moments import Moments
from batchnorm.statistics import Renorm

__all__ = ["EVERY", "KEPT", "LayerHistory", "look"]

EVERY = 5  # one training pass in so many is looked at
KEPT = 8  # batches kept: with EVERY, of the last 40 passes, what a momentum of 0.1 remembers
ORIGINS = 4  # places that call the layer, of each of which so many are kept too
GRADIENTS_EVERY = 20  # of these passes the gradient's norm is taken
FIRST_GRADIENTS = 3  # and of the first passes, when weights are as they were initialized
GRADIENTS = 64  # norms kept of a layer; then every second is forgotten


def look(number: int) -> int:
    """The pass, from 1, that is looked at as the `number`th, from 0: one of every five.

    Which of the five moves by the golden ratio, so that what repeats every few passes (the last
    batch of an epoch, real and generated batches in turn) is seen at all its phases.
    """
    return EVERY * number + int(EVERY * ((number + 0.5) * 0.618034 % 1)) + 1


class LayerHistory:
    """One layer: its last batches, and its running statistics when they were last used.

    The buffers are held, the layer is not: they are small, and a model that is gone by the end
    of the run is reported all the same.
    """

    def __init__(self, call: Call, leads: ModelHistory | None) -> None:
        layer = call.layer
        self.path = call.path
        self.name = name_of(call.root, call.path)
        self.layer = ref(layer)
        self.leads = leads
        self.is_averaged = isinstance(call.root, AveragedModel)
        self.is_corrected = isinstance(call.policy, Renorm)
        self.channels = layer.num_features
        self.momentum: float | None = layer.momentum
        self.eps = layer.eps
        affine = layer.weight if layer.weight is not None else layer.bias
        self.affine = None if affine is None else ref(affine)
        self.parameter = 0 if affine is None else id(affine)
        self.weight: Tensor | None = None
        self.running: tuple[Tensor, Tensor] | None = None
        self.version: int | None = None
        self.calls = 0  # that may have moved the statistics since `version` was read
        self.passes = 0  # of training
        self.due = look(0)  # the pass to look at
        self.batches: deque[Update | Direct] = deque(maxlen=KEPT)
        self.origins: dict[str, deque[tuple[int, Update | Direct]]] = {}
        self.used: tuple[Tensor, Tensor, list[Update | Direct]] | None = None
        self.evaluated: deque[Update | Direct] = deque(maxlen=KEPT)
        self.backwards = 0  # since the last step of an optimizer
        self.stepped_at = batches_version(layer)
        self.failed = ""
        self.task = -1  # of autograd: the last backward pass
        self.updates: Counter[int] = Counter()
        self.decay = 0.0
        self.learning = self.frozen = 0  # passes looked at
        self.gradients: list[tuple[int, Tensor]] = []
        self.gradients_every = GRADIENTS_EVERY
        # policies come and go on this library's layers
        self.may_ask = isinstance(layer, (nn.SyncBatchNorm, BatchNorm))
        self.asks: tuple[int, ...] = ()
        self.is_training = True  # at its last call
        self.learned_in_eval = 0  # backward passes
        self.is_broadcast = False
        self.trained = True  # since it was last evaluated, or never evaluated
        self.evaluations = 0
        self.evaluated_with: Statistics | None = None

    def refresh(self, call: Call) -> None:
        """Follow the layer, and forget its batches where somebody else wrote its buffers.

        Statistics that were loaded belong to weights that were loaded with them, and the batches
        do not. Statistics that were only reset belong to the weights that are here.
        """
        mean, var = call.layer.running_mean, call.layer.running_var
        if mean is not None and mean.numel() != self.channels:  # pruned
            self.channels = mean.numel()
            self.forget()
        self.running = None if mean is None or var is None else (mean, var)
        self.momentum, self.eps = call.layer.momentum, call.layer.eps
        self.weight = None if call.layer.weight is None else call.layer.weight.detach()
        version = call.batches_version()
        if version is not None and self.version is not None:
            # a pass writes its counter once; a broadcast of rank 0's writes it too
            written = version - self.version > self.calls and not _is_broadcast(call.root)
            if written and not _are_initial(call.layer):
                self.forget()
        self.version, self.calls = version, 0

    def forget(self) -> None:
        """Forget batches that belong to other weights or statistics."""
        self.batches.clear()
        self.origins.clear()
        self.evaluated.clear()
        self.used = None

    def note_batch(self, batch: Update | Direct, origin: str) -> None:
        """Keep a batch, and where it came from; then wait for the next to look at."""
        self.due = look((self.passes - 1) // EVERY + 1)
        self.batches.append(batch)
        if origin in self.origins or len(self.origins) < ORIGINS:
            kept = self.origins.setdefault(origin, deque(maxlen=KEPT))
            kept.append((self.passes, batch))

    def note_use(self) -> None:
        """Copy what inference uses, the first time after training."""
        if self.used is None and self.running is not None and self.batches:
            mean, var = self.running
            self.used = (mean.clone(), var.clone(), list(self.batches))

    def note_evaluation(self, call: Call) -> None:
        """Copy what inference uses, whatever is known of the batches."""
        self.trained = False
        self.evaluations += 1
        self.evaluated_with = call.running_statistics() if self.used is None else self.used[:2]

    def note_evaluated(self, call: Call) -> None:
        """Of averaged weights, which never train: what they are given when they are evaluated."""
        self.passes += 1
        few = len(self.evaluated) < KEPT  # an evaluation may be short
        if (few or self.passes >= self.due) and call.input is not None:
            self.due = look((self.passes - 1) // EVERY + 1)
            self.refresh(call)
            self.evaluated.append(direct(call.input))

    def note_learning(self, layer: TorchBatchNorm) -> None:
        """Count whether γ or β has a gradient to get."""
        affine = [p for p in (layer.weight, layer.bias) if p is not None]
        if not affine or any(p.requires_grad for p in affine):
            self.learning += 1
        else:
            self.frozen += 1

    def listen(self, output: Tensor) -> None:
        """Count backward passes; of some, take the norm of the gradient."""
        step = self.passes
        takes = step <= FIRST_GRADIENTS or step % self.gradients_every == 1
        if not takes and self.leads is None:
            return  # the model's first layer counts for all
        hook = partial(self._hear, step, takes)
        unserializable_hook(hook)  # saving the output is to warn of nothing
        output.register_hook(hook)

    def _hear(self, step: int, takes: bool, gradient: Tensor) -> None:
        try:
            self.note_backward()
            if takes:
                self.note_gradient(step, gradient.detach())
        except Exception as error:  # the user's backward pass must go on
            self.failed = f"{type(error).__name__}: {error}"

    def listen_in_eval(self, output: Tensor) -> None:
        """Count backward passes through a layer in eval mode: it is part of what trains."""

        def hook(gradient: Tensor) -> None:
            self.learned_in_eval += 1

        unserializable_hook(hook)
        output.register_hook(hook)

    def note_gradient(self, step: int, gradient: Tensor) -> None:
        """Take the norm; no device is waited for."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient, dtype=dtype)
        self.gradients.append((step, norm))
        if len(self.gradients) > GRADIENTS:
            del self.gradients[1::2]
            self.gradients_every *= 2

    def note_backward(self) -> None:
        """Count a backward pass; gradients that were dropped before it are no part of the step."""
        task = torch._C._current_graph_task_id()
        if task == self.task:
            return  # a pass through two calls is one pass
        self.task = task
        parameter = None if self.affine is None else self.affine()
        gradient = parameter.grad if parameter is not None and parameter.is_leaf else None
        # zeros are looked for where that does not make a device wait
        if gradient is None or (gradient.device.type == "cpu" and not gradient.any()):
            self.backwards = 0
        self.backwards += 1

    def note_step(self, decay: float) -> None:
        """Count the backward passes that a step of the optimizer added up.

        As many as the statistics had batches: one, where those of several passes were pooled.
        """
        layer = self.layer()
        version = None if layer is None else batches_version(layer)
        if self.backwards:
            apart = self.backwards
            if version is not None and self.stepped_at is not None:
                apart = min(apart, max(version - self.stepped_at, 1))
            self.updates[apart] += 1
        self.stepped_at, self.backwards, self.decay = version, 0, decay

    def statistics(self) -> dict[str, Statistics]:
        """What the layer holds, and what it was last evaluated with, by digest."""
        both = (told(self.running), told(self.evaluated_with))
        return {name: pair for name, pair in both if pair is not None}

    def view(self) -> LayerView:
        """What other ranks are told of it."""
        held = used = told(self.running)[0]
        if not self.is_averaged:  # it changes in other ways than by training
            used = told(self.evaluated_with)[0]
        return LayerView(
            self.path,
            self.name,
            self.eps,
            weights=digest(self.weight),
            held=held,
            used=used if self.evaluations else "",
            evaluations=self.evaluations,
            is_broadcast=self.is_broadcast,
            asks=self.asks,
            is_training=self.is_training,
            learned_in_eval=self.learned_in_eval,
        )

    def evidence(self) -> LayerEvidence:
        """At the last evaluation, or now if training went on after it.

        Raises `RuntimeError` where something went wrong in a backward pass.
        """
        if self.failed:
            raise RuntimeError(f"in a backward pass: {self.failed}")
        self.note_use()
        running, batches = None, list(self.batches)
        if self.is_averaged and self.evaluated:
            batches = list(self.evaluated)
            running = None if self.running is None else _copies(*self.running)
        elif self.used is not None:
            mean, var, batches = self.used
            running = _copies(mean, var)
        return LayerEvidence(
            self.path,
            eps=self.eps,
            momentum=self.momentum,
            channels=self.channels,
            weight=None if self.weight is None else self.weight.double().cpu(),
            running=running,
            batches=_finite(batches),
            origins={name: _origin(list(kept)) for name, kept in self.origins.items()},
            gradients=[GradientNorm(step, float(norm)) for step, norm in self.gradients],
            updates=self.updates,
            decay=self.decay,
            learns=not self.frozen or bool(self.learning),
            is_averaged=self.is_averaged,
            is_corrected=self.is_corrected,
        )


def _origin(kept: list[tuple[int, Update | Direct]]) -> Origin:
    batches = _finite([batch for _, batch in kept])
    return Origin(batches, [number for number, _ in kept] if batches else [])


def _is_broadcast(root: nn.Module) -> bool:
    return isinstance(root, DistributedDataParallel) and root.broadcast_buffers


def _finite(batches: list[Update | Direct]) -> list[Moments]:
    """Their moments; none where the data of one failed, and the statistics kept out of it."""
    moments = [batch.moments() for batch in batches]
    whole = all((m.mean.isfinite() & m.m2.isfinite()).all() for m in moments)
    return moments if whole else []


def _copies(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return mean.double().cpu(), var.double().cpu()


def _are_initial(layer: TorchBatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return mean is None or var is None or bool((mean == 0).all() & (var == 1).all())

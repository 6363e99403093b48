"""What is remembered of a training run, a few numbers of every fifth pass of each layer."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from batchnorm.audit.call import Call, TorchBatchNorm
from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.features import features
from batchnorm.audit.place import is_inside_autograd_function, root_call, trail
from batchnorm.audit.profile import GradientNorm, Period
from batchnorm.moments import Moments

__all__ = ["EVERY", "KEPT", "History"]

EVERY = 5  # one training pass in so many is looked at; odd, where kinds of batches take turns
KEPT = 8  # batches kept: with EVERY, of the last 40 passes, what a momentum of 0.1 remembers
PER_ORIGIN = 8  # and of each place that calls the layer
ORIGINS = 4  # such places
SAMPLES = 16  # batches of the model's input
GRADIENTS_EVERY = 20  # of these passes the gradient's norm is taken
FIRST_GRADIENTS = 3  # and of the first passes, when weights are as they were initialized
GRADIENTS = 64  # norms kept of a layer; then every second is forgotten
PERIODS = 100  # modes kept of a model, from the beginning, and as many from the end

_NOTE = "history"


class History:
    """What a probe remembers of a run, for the rules that weigh it when it has ended."""

    def __init__(self) -> None:
        self._layers: dict[int, _LayerHistory] = {}
        self._models: dict[str, _ModelHistory] = {}  # by name, of which each model has its own
        self._calls = 0

    def before(self, call: Call) -> None:
        """In training, note the statistics before every few passes; in eval, what is used."""
        mean = call.layer.running_mean
        if mean is not None and mean.is_meta:
            return  # it computes nothing
        self._calls += 1
        own = self._layers.get(call.number)
        if own is None:
            own = self._begin(call)
        if own.leads is not None:
            own.leads.note_mode(call)
        if call.tracks:
            if call.has_gradients or is_inside_autograd_function():
                own.used = None
                own.passes += 1
                if own.passes >= own.due:
                    own.refresh(call)
                    call.notes[_NOTE] = own.version, call.running_statistics()
            own.calls += 1
        elif not call.layer.training and call.layer.running_mean is not None:
            if own.used is None:
                own.refresh(call)
                own.note_use()
            if own.is_averaged:
                own.note_evaluated(call)

    def after(self, call: Call) -> None:
        """Read the batch's statistics off what the pass added to the running ones."""
        own = self._layers.get(call.number)
        if own is None:
            return
        if call.tracks and call.output is not None and call.output.requires_grad:
            own.listen(call.output)
        note = call.notes.get(_NOTE)
        if note is None:
            return
        version, old = note
        # a checkpoint's recomputation moves nothing: look at the next pass instead
        if version is not None and version == call.batches_version():
            return
        own.due = own.passes + EVERY
        own.note_learning(call.layer)
        origin = trail()
        batch = _batch(call, old)
        if batch is None:
            return
        own.batches.append(batch)
        if origin in own.origins or len(own.origins) < ORIGINS:
            own.origins.setdefault(origin, deque(maxlen=PER_ORIGIN)).append(batch)
        if own.leads is not None:
            own.leads.note_samples(origin)

    def _begin(self, call: Call) -> _LayerHistory:
        model = None
        name = call.path.partition(".")[0]
        if name not in self._models:  # of a model's layers the first to be called
            model = self._models[name] = _ModelHistory(name)
        own = self._layers[call.number] = _LayerHistory(call, model)
        return own

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Note, at an optimizer's step, what its layers computed since its last."""
        mine = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for own in self._layers.values():
            group = mine.get(own.parameter)
            if group is None:
                continue
            if own.backwards:
                own.updates[own.backwards] += 1
            own.backwards = 0
            own.decay = float(group.get("weight_decay") or 0.0)

    def evidence(self, uncalled: list[str]) -> Evidence:
        """What the rules weigh: the run as it stands now."""
        samples = max((m.samples() for m in self._models.values()), key=len, default=[])
        return Evidence(
            [own.evidence() for own in self._layers.values()],
            batches=self._calls,
            is_run=True,
            uncalled=uncalled,
            samples=samples,
        )

    def timeline(self) -> tuple[Period, ...]:
        """The modes of every model, one model after the other."""
        return tuple(period for m in self._models.values() for period in m.periods())


class _LayerHistory:
    """One layer: its last batches, and its running statistics when they were last used.

    The buffers are held, the layer is not: they are small, and a model that is gone by the end
    of the run is reported all the same.
    """

    def __init__(self, call: Call, leads: _ModelHistory | None) -> None:
        layer = call.layer
        self.path = call.path
        self.leads = leads
        self.is_averaged = isinstance(call.root, AveragedModel)
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
        self.due = EVERY  # the pass to look at
        self.batches: deque[_Update | _Direct] = deque(maxlen=KEPT)
        self.origins: dict[str, deque[_Update | _Direct]] = {}
        self.used: tuple[Tensor, Tensor, list[_Update | _Direct]] | None = None
        self.evaluated: deque[_Update | _Direct] = deque(maxlen=KEPT)
        self.backwards = 0  # since the last step of an optimizer
        self.task = -1  # of autograd: the last backward pass
        self.updates: Counter[int] = Counter()
        self.decay = 0.0
        self.learning = self.frozen = 0  # passes looked at
        self.gradients: list[tuple[int, Tensor]] = []
        self.gradients_every = GRADIENTS_EVERY

    def refresh(self, call: Call) -> None:
        """Follow the layer, and forget its batches where somebody else wrote its buffers.

        Statistics that were loaded belong to weights that were loaded with them, and the batches
        do not. Statistics that were only reset belong to the weights that are here.
        """
        mean, var = call.layer.running_mean, call.layer.running_var
        self.running = None if mean is None or var is None else (mean, var)
        self.momentum, self.eps = call.layer.momentum, call.layer.eps
        self.weight = None if call.layer.weight is None else call.layer.weight.detach()
        version = call.batches_version()
        if version is not None and self.version is not None:
            written = version - self.version > self.calls  # a pass writes its counter once
            if written and not _are_initial(call.layer):
                self.batches.clear()
                self.origins.clear()
        self.version, self.calls = version, 0

    def note_use(self) -> None:
        """Copy what inference uses, the first time after training."""
        if self.used is None and self.running is not None and self.batches:
            mean, var = self.running
            self.used = (mean.clone(), var.clone(), list(self.batches))

    def note_evaluated(self, call: Call) -> None:
        """Of averaged weights, which never train: what they are given when they are evaluated."""
        self.passes += 1
        if self.passes % EVERY == 1 and call.input is not None:
            self.running = call.layer.running_mean, call.layer.running_var  # type: ignore[assignment]
            self.evaluated.append(_direct(call.input))

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

        def hook(gradient: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            if task != self.task:  # a pass through two calls is one pass
                self.task = task
                self.note_backward()
            if takes:
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
                self.gradients.append((step, norm))
                if len(self.gradients) > GRADIENTS:
                    del self.gradients[1::2]
                    self.gradients_every *= 2

        output.register_hook(hook)

    def note_backward(self) -> None:
        """Count a backward pass; gradients that were dropped before it are no part of the step."""
        parameter = None if self.affine is None else self.affine()
        gradient = None if parameter is None else parameter.grad
        # zeros are looked for where that does not make a device wait
        if gradient is None or (gradient.device.type == "cpu" and not gradient.any()):
            self.backwards = 0
        self.backwards += 1

    def evidence(self) -> LayerEvidence:
        """At the last evaluation, or now if training went on after it."""
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
            origins={origin: _finite(list(kept)) for origin, kept in self.origins.items()},
            gradients=[GradientNorm(step, float(norm)) for step, norm in self.gradients],
            updates=self.updates,
            decay=self.decay,
            learns=not self.frozen or bool(self.learning),
            is_averaged=self.is_averaged,
        )


class _ModelHistory:
    """One model: its modes, and what came in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._begun: list[Period] = []
        self._recent: deque[Period] = deque(maxlen=PERIODS)
        self._mode, self._passes, self._dropped = "", 0, 0
        self._samples: dict[str, deque[Tensor]] = {}

    def note_mode(self, call: Call) -> None:
        """Count a pass in the mode that the model is in."""
        mode = "eval"
        if call.root.training:
            mode = "train" if call.has_gradients else "train without gradients"
        if mode == self._mode:
            self._passes += 1
            return
        self._keep()
        self._mode, self._passes = mode, 1

    def _keep(self) -> None:
        if not self._passes:
            return
        period = Period(self.name, self._mode, self._passes)
        if len(self._begun) < PERIODS:
            self._begun.append(period)
            return
        if len(self._recent) == PERIODS:
            self._dropped += self._recent[0].passes
        self._recent.append(period)

    def periods(self) -> list[Period]:
        """The modes in their order; of very many, those at the beginning and at the end."""
        between = [Period(self.name, "several", self._dropped)] if self._dropped else []
        last = [Period(self.name, self._mode, self._passes)] if self._passes else []
        return [*self._begun, *between, *self._recent, *last]

    def note_samples(self, origin: str) -> None:
        """Remember what was given to the model whose pass is under way."""
        seen = features(root_call()[1])
        if seen is not None and (origin in self._samples or len(self._samples) < ORIGINS):
            self._samples.setdefault(origin, deque(maxlen=SAMPLES)).append(seen)

    def samples(self) -> list[Tensor]:
        """Those of the place that called the model most often."""
        most = max(self._samples.values(), key=len, default=deque())
        same = [x for x in most if x.shape[1] == most[-1].shape[1]]
        return [x.double().cpu() for x in same]


class _Update(NamedTuple):
    """What one training pass did to the running mean and variance.

    new = (1 − m)·old + m·batch, so batch = old + (new − old)/m: exact for masks, ghost slices
    and several ranks too, and without a look at n·c·positions values. It is worked out when
    somebody asks; a pass of training only copies.
    """

    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    momentum: float | Tensor
    values: int  # a channel

    def moments(self) -> Moments:
        """The batch's own moments, in float64 on the CPU."""
        (mean, var), (new_mean, new_var) = (
            [t.double().cpu() for t in pair] for pair in (self.old, self.new)
        )
        m = self.momentum.double().cpu() if isinstance(self.momentum, Tensor) else self.momentum
        n = torch.full_like(mean, self.values, dtype=torch.int64)
        batch_var = var + (new_var - var) / m
        # what rounding could have left of a variance of 0 is none
        rounding = 4 * torch.finfo(self.old[1].dtype).eps * torch.maximum(var, new_var) / m
        batch_var = batch_var.where(batch_var > rounding, 0)
        return Moments(n, mean + (new_mean - mean) / m, batch_var * (n - 1))


class _Direct(NamedTuple):
    """The moments of the input itself, where the running statistics do not tell them."""

    own: Moments

    def moments(self) -> Moments:
        """The batch's moments, in float64 on the CPU."""
        return Moments(
            self.own.count.cpu(), self.own.mean.double().cpu(), self.own.m2.double().cpu()
        )


# Compiled layers do not show their input. With so many values a variance is as good as unbiased.
_UNTOLD = 2**20


def _batch(call: Call, old: tuple[Tensor, Tensor]) -> _Update | _Direct | None:
    layer, x = call.layer, call.input
    m: float | Tensor | None = layer.momentum
    if m is None and layer.num_batches_tracked is not None:
        m = 1 / layer.num_batches_tracked
    new = call.running_statistics()
    # half precision rounds the step away; a momentum of 0 makes none
    if m is None or layer.momentum == 0 or old[0].dtype.itemsize < 4 or new is None:
        return None if x is None else _direct(x)
    return _Update(old, new, m, _UNTOLD if x is None else x.numel() // x.shape[1])


def _direct(x: Tensor) -> _Direct:
    return _Direct(Moments.of(x.detach(), (0, *range(2, x.ndim))))


def _finite(batches: list[_Update | _Direct]) -> list[Moments]:
    """Their moments; none where the data of one failed, and the statistics kept out of it."""
    moments = [batch.moments() for batch in batches]
    whole = all((m.mean.isfinite() & m.m2.isfinite()).all() for m in moments)
    return moments if whole else []


def _copies(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return mean.double().cpu(), var.double().cpu()


def _are_initial(layer: TorchBatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return mean is None or var is None or bool((mean == 0).all() & (var == 1).all())

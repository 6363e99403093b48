"""What is remembered of a training run, a few numbers of every fifth pass of each layer."""

from __future__ import annotations

from collections import deque
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.audit.call import Call
from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.layer_history import LayerHistory
from batchnorm.audit.model_history import ModelHistory
from batchnorm.audit.place import is_inside, is_inside_autograd_function, trail
from batchnorm.audit.profile import Period
from batchnorm.audit.rank_view import RankView, Statistics
from batchnorm.audit.sync_log import SyncLog
from batchnorm.audit.synchronizing import asked
from batchnorm.audit.update import update
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.models.wrapped import unwrapped
from batchnorm.ranks import caller_of, size_of
from batchnorm.statistics import Sync

__all__ = ["History"]

ROOM = 256  # layers more than live, before those that are gone are put away
GONE = 2048  # of which so many are remembered

_NOTE = "history"

# In eval mode, for statistics that are to be replaced.
_ESTIMATES = frozenset({("batchnorm/repair/recalibration/recalibration.py", "recalibrate")})


class History:
    """What a probe remembers of a run, for the rules that weigh it when it has ended."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerHistory] = {}
        self._models: dict[str, ModelHistory] = {}  # by name, of which each model has its own
        self._gone: deque[LayerEvidence] = deque(maxlen=GONE)
        self._room = ROOM
        self._calls = 0
        self._log = SyncLog()
        self._distributed: WeakKeyDictionary[DistributedDataParallel, bool] = WeakKeyDictionary()
        self._broadcast: WeakSet[nn.Module] = WeakSet()  # layers that get rank 0's buffers
        self._is_connected = False  # to other ranks, by a process group
        self._asking: WeakSet[nn.Module] = WeakSet()  # distributed, of layers that synchronize

    def entering(self, model: DistributedDataParallel) -> None:
        """See whose buffers rank 0's are written over before each forward pass."""
        if self._distributed.get(model) is not model.broadcast_buffers:
            self._distributed[model] = model.broadcast_buffers
            layers = [m for m in model.modules() if isinstance(m, TorchBatchNorm)]
            change = self._broadcast.add if model.broadcast_buffers else self._broadcast.discard
            for layer in layers:
                change(layer)
            if any(asked(layer) for layer in layers):
                self._asking.add(model)
        if model in self._asking and model.training and torch.is_grad_enabled():
            # it asks the others itself, before its layers do
            wrapped = type(unwrapped(model)).__name__
            self._log.note(Sync(model.process_group), f"DistributedDataParallel of {wrapped}")

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
        if own.may_ask:
            self._note_asking(own, call)
        if call.tracks:
            own.trained = True
            if call.has_gradients or is_inside_autograd_function():
                own.used = None
                own.passes += 1
                own.note_learning(call.layer)
                if own.passes >= own.due:
                    own.refresh(call)
                    own.is_broadcast = call.layer in self._broadcast
                    self._is_connected |= size_of(None) > 1
                    call.notes[_NOTE] = own.version, call.running_statistics()
            own.calls += 1
        elif not call.layer.training and call.layer.running_mean is not None:
            if (own.used is None or own.trained) and not is_inside(_ESTIMATES):
                if own.used is None:
                    own.refresh(call)
                    own.note_use()
                if own.trained:
                    own.note_evaluation(call)
            if own.is_averaged:
                own.note_evaluated(call)

    def after(self, call: Call) -> None:
        """Read the batch's statistics off what the pass added to the running ones."""
        own = self._layers.get(call.number)
        if own is None:
            return
        if call.output is not None and call.output.requires_grad:
            if call.tracks:
                own.listen(call.output)
            elif own.may_ask and not call.layer.training:
                own.listen_in_eval(call.output)
        note = call.notes.get(_NOTE)
        if note is None:
            return
        version, old = note
        # a checkpoint's recomputation moves nothing: look at the next pass instead
        if version is not None and version == call.batches_version():
            return
        origin = trail()
        batch = update(call, old)
        if batch is not None:
            own.note_batch(batch, origin)
        if own.leads is not None:
            own.leads.note_samples(origin)

    def _note_asking(self, own: LayerHistory, call: Call) -> None:
        """Count a collective that is about to begin."""
        own.is_training = call.layer.training
        sync = asked(call.layer) if call.layer.training else None
        if sync is not None:
            if not own.asks:
                own.name = caller_of(call.layer).name  # which is the same on all that ask
            own.asks = self._log.note(sync, own.name)

    def _begin(self, call: Call) -> LayerHistory:
        model = None
        name = call.path.partition(".")[0]
        if name not in self._models:  # of a model's layers the first to be called
            model = self._models[name] = ModelHistory(name)
        if len(self._layers) >= self._room:
            self._put_away()
        own = self._layers[call.number] = LayerHistory(call, model)
        return own

    def _put_away(self) -> None:
        """Of layers that are gone, keep what is weighed alone, and of very many the latest."""
        for number, own in list(self._layers.items()):
            if own.layer() is None:
                self._gone.append(own.evidence())
                del self._layers[number]
        self._room = len(self._layers) + ROOM

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Note, at an optimizer's step, what its layers computed since its last."""
        mine = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for own in list(self._layers.values()):
            group = mine.get(own.parameter)
            if group is None or own.affine is None or own.affine() is None:
                continue
            own.note_step(float(group.get("weight_decay") or 0.0))

    def evidence(self, uncalled: list[str]) -> Evidence:
        """What the rules weigh: the run as it stands now."""
        layers = list(self._layers.values())
        return Evidence(
            [*self._gone, *(own.evidence() for own in layers)],
            batches=self._calls,
            is_run=True,
            uncalled=uncalled,
            samples={own.path: own.leads.samples() for own in layers if own.leads is not None},
        )

    def view(self, rank: int, status: int | None) -> RankView:
        """What rules that look at all ranks are told of this one."""
        layers = tuple(own.view() for own in self._layers.values())
        calls = self._log.calls()
        return RankView(rank, layers, calls, status, is_connected=self._is_connected)

    def statistics(self) -> dict[str, Statistics]:
        """By digest, what the layers hold, and what they were last evaluated with."""
        return {k: v for own in self._layers.values() for k, v in own.statistics().items()}

    def timeline(self) -> tuple[Period, ...]:
        """The modes of every model, one model after the other."""
        return tuple(period for m in list(self._models.values()) for period in m.periods())

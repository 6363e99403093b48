"""What is remembered of a training run, a few numbers of every fifth pass of each layer."""

from __future__ import annotations

from collections import deque

import torch

from batchnorm.audit.call import Call
from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.layer_history import LayerHistory
from batchnorm.audit.model_history import ModelHistory
from batchnorm.audit.place import is_inside, is_inside_autograd_function, trail
from batchnorm.audit.profile import Period
from batchnorm.audit.update import update

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
                own.note_learning(call.layer)
                if own.passes >= own.due:
                    own.refresh(call)
                    call.notes[_NOTE] = own.version, call.running_statistics()
            own.calls += 1
        elif not call.layer.training and call.layer.running_mean is not None:
            if own.used is None and not is_inside(_ESTIMATES):
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
        origin = trail()
        batch = update(call, old)
        if batch is not None:
            own.note_batch(batch, origin)
        if own.leads is not None:
            own.leads.note_samples(origin)

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

    def timeline(self) -> tuple[Period, ...]:
        """The modes of every model, one model after the other."""
        return tuple(period for m in list(self._models.values()) for period in m.periods())

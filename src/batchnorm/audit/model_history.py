"""What is remembered of one model in a training run: its modes, and what came in."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from batchnorm.audit.call import Call
from batchnorm.audit.features import features
from batchnorm.audit.place import root_call
from batchnorm.audit.profile import Period

__all__ = ["ModelHistory"]

ORIGINS = 4  # places that call the model
SAMPLES = 16  # batches remembered of each
PERIODS = 100  # modes kept of a model, from the beginning, and as many from the end


class ModelHistory:
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
        """What the model was given; nothing where several places give it something.

        Those may be real and generated samples, which drift while the generator learns: BN123
        compares such calls, and no shuffling makes them alike.
        """
        if len(self._samples) != 1:
            return []
        (kept,) = self._samples.values()
        return [x.double().cpu() for x in kept if x.shape[1] == kept[-1].shape[1]]

"""The switches of one batch norm layer, whoever wrote it: read, set, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm.layers import BatchNorm
from batchnorm.layers.adoption import adopt, is_adoptable, release
from batchnorm.layers.base import learning, let_learn
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.repair.freezing.classes import held, hold, let_go
from batchnorm.repair.frozen_statistics import obeys_flag
from batchnorm.repair.table import shown
from batchnorm.statistics import Running

__all__ = ["Earlier", "Switches", "freeze_layer", "is_frozen", "thaw"]

_LEARNED = "_learned_before_freezing"  # of another's layer: which parameters did
_ADOPTED = "_adopted_to_freeze"


@dataclass(frozen=True)
class Switches:
    """The three switches of a batch norm layer in training mode.

    - `statistics`: whose are used.
    - `updates`: whether the running ones move towards the batch's.
    - `learns`: whether γ or β has gradients.
    """

    statistics: Literal["running", "batch"]
    updates: bool
    learns: bool

    def __post_init__(self) -> None:
        if self.statistics not in ("running", "batch"):
            raise ValueError(
                f'statistics must be "running" or "batch", got {self.statistics!r}: whose '
                "statistics to use in training"
            )

    @classmethod
    def of(cls, layer: TorchBatchNorm) -> Switches:
        """The switches as they are."""
        policy = layer.statistics if isinstance(layer, BatchNorm) else None
        in_eval = held(layer) == "training"
        tracks = layer.track_running_stats and layer.running_mean is not None and not in_eval
        return cls(
            "running" if in_eval or isinstance(policy, Running) else "batch",
            bool(tracks and (policy is None or policy.updates)),
            any(parameter.requires_grad for parameter in layer.parameters()),
        )


class Earlier:
    """The state of a layer's switches, to be put back."""

    def __init__(self, layer: TorchBatchNorm) -> None:
        self.switches = Switches.of(layer)
        self.layer, self._was_frozen, self._learned = layer, is_frozen(layer), learning(layer)

    def put_back(self) -> None:
        """Make the switches what they were."""
        thaw(self.layer)
        if self._was_frozen:
            freeze_layer("", self.layer, self.switches)
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(self._learned.get(name, True))


def is_frozen(layer: TorchBatchNorm) -> bool:
    """Whether a layer is frozen, also where each switch is as it was."""
    ours = isinstance(layer, BatchNorm)
    return layer._thawed is not None if ours else _LEARNED in vars(layer)


def freeze_layer(path: str, layer: TorchBatchNorm, switches: Switches) -> None:
    """Set the switches of a layer, frozen or not."""
    thaw(layer)
    used, updates, learns = switches.statistics, switches.updates, switches.learns
    tracked = layer.running_mean is not None
    if is_adoptable(layer) and used == "running" and updates:
        adopt(layer)
        vars(layer)[_ADOPTED] = True
    if isinstance(layer, BatchNorm):
        layer.freeze(statistics=used, updates=updates, learns=learns)
        return
    learned = vars(layer)[_LEARNED] = learning(layer)
    if used == "running" and updates:
        raise TypeError(
            f"{shown(path)} is a {type(layer).__name__}, which normalizes either by its running "
            "statistics or moves them; convert it to a layer of this library, or leave it out "
            "with where="
        )
    if used == "running":
        hold(layer, "training")
    elif tracked and not updates:
        if not obeys_flag(layer):
            raise TypeError(
                f"{shown(path)} is a {type(layer).__name__}, whose own forward decides whether its "
                "running statistics move when it uses the batch's; freeze it with statistics="
                '"running", call it inside frozen_statistics(), or leave it out with where='
            )
        hold(layer, "track_running_stats")
    let_learn(layer, learned, learns)


def thaw(layer: TorchBatchNorm) -> None:
    """Undo `freeze_layer`, if there was one."""
    if isinstance(layer, BatchNorm):
        layer.unfreeze()
        if vars(layer).pop(_ADOPTED, False):
            release(layer)
        return
    if held(layer):
        let_go(layer)
    learned = vars(layer).pop(_LEARNED, None)
    if learned is not None:
        let_learn(layer, learned, True)

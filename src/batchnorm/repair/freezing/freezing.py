"""Freeze batch norm layers so that it lasts: statistics, their updates, γ and β, each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.norms import TorchBatchNorm, Where, batch_norms, is_meant
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.repair.freezing.layers import Earlier, Switches, freeze_layer, is_frozen, thaw
from batchnorm.repair.table import counted, listed, shown, table

__all__ = ["Freezing", "Frozen", "Switches", "freeze", "unfreeze"]


@dataclass(frozen=True)
class Frozen:
    """A layer that was frozen, its switches before and after."""

    path: str
    before: Switches
    after: Switches


@dataclass(frozen=True, eq=False)
class Freezing:
    """What `freeze` did. As a context it undoes that at its end.

    - `layers`: the layers.
    - `parameters`: the names of the γs and βs that learned before and no longer do; not
      how many there are, as in a `Conversion`.
    """

    layers: tuple[Frozen, ...]
    parameters: tuple[str, ...]
    _model: nn.Module
    _earlier: tuple[Earlier, ...]

    def undo(self) -> None:
        """Give the layers the switches back that they had; what was learned since stays.

        Raises `ValueError` where a layer has been frozen otherwise since, which has to be undone
        first, and `TypeError` where its class has been replaced. Then nothing is changed.
        """
        for frozen, earlier in zip(self.layers, self._earlier, strict=True):
            now = Switches.of(earlier.layer)
            same = (now.statistics, now.updates) == (frozen.after.statistics, frozen.after.updates)
            if is_frozen(earlier.layer) and not same:
                raise ValueError(
                    f"{shown(frozen.path)} has been frozen otherwise since; undo that first"
                )
        with _undone_on_failure(self._model, (earlier.layer for earlier in self._earlier)):
            for earlier in self._earlier:
                earlier.put_back()

    def __enter__(self) -> Freezing:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        rows = []
        for layer in self.layers:
            both = (layer.before, layer.after)
            changes = (
                [s.statistics for s in both],
                ["yes" if s.updates else "no" for s in both],
                ["learn" if s.learns else "fixed" for s in both],
            )
            rows.append(
                (shown(layer.path), *(" → ".join(dict.fromkeys(change)) for change in changes))
            )
        sizes = counted(len(self.layers), "layer"), counted(len(self.parameters), "parameter")
        return table(
            f"Freezing: {', '.join(sizes)}", ("layer", "statistics", "updated", "γ, β"), rows
        )


def freeze(
    model: nn.Module,
    *,
    where: Where = None,
    statistics: Literal["running", "batch"] = "running",
    updates: bool = False,
    learns: bool = False,
) -> Freezing:
    """Freeze a model's batch norms, in training mode too: the running statistics, γ and β.

    ```python
    freeze(model)                                   # as in eval mode from now on, no gradients
    freeze(model, where="backbone.*", learns=True)  # the statistics alone
    freeze(model, updates=True)                     # use the running ones, which follow the data
    with freeze(model):                             # or for as long as this lasts
        loss_of(model(x)).backward()
    unfreeze(model)
    ```

    Unlike `eval()` it survives `model.train()`; copies, pickles and loaded state_dicts too, which
    have the keys that they always had. Called again, it sets the switches anew.

    A layer stays the same module with the same parameters and hooks. This library's get another
    policy. Others' become of a class derived from their own, which computes as in eval mode, so
    that their outputs keep their bits; for `updates=True` of running statistics that are used,
    which `torch.nn` cannot do, its layers become this library's until they are unfrozen.

    Freeze before `DistributedDataParallel` wraps the model, which notes what learns. A
    parameter that layers share is frozen for all of them, and gradients of those frozen are let
    go, since an optimizer would go on to step along them.

    - `where`: which layers, by path (`"backbone.*"`), or by asking `where(path, layer)`; all.
    - `statistics`: whose to use in training: the `"running"` ones, or the `"batch"`'s, as the
      layer's policy takes them.
    - `updates`: whether the running ones move towards the batch's; where they are used too, to
      this rank's, also in a layer of statistics=Sync(): `reduce_statistics` merges them.
    - `learns`: whether γ and β learn where they did; if not, they have no gradients.

    Returns what was changed, which can be undone.

    Raises `ValueError` where no layer is meant, for layers that are lazy, or whose running
    statistics are missing or not finite and are to be used, and `TypeError` for layers of others
    that cannot be told. Then nothing is frozen.
    """
    switches = Switches(statistics, updates, learns)
    layers = _meant(model, where)
    if statistics == "running":
        _check_statistics(layers)
    earlier = tuple(Earlier(layer) for layer in layers.values())
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _undone_on_failure(model, layers.values()):
        for path, layer in layers.items():
            freeze_layer(path, layer, switches)
    frozen = (
        Frozen(path, each.switches, Switches.of(layer))
        for (path, layer), each in zip(layers.items(), earlier, strict=True)
    )
    parameters = (name for name, parameter in learned.items() if not parameter.requires_grad)
    return Freezing(tuple(frozen), tuple(parameters), model, earlier)


def unfreeze(model: nn.Module, *, where: Where = None) -> tuple[str, ...]:
    """Undo `freeze`: classes, policies and updates as before, and what learned learns again.

    - `where`: which layers; see `freeze`.

    Returns the paths of the layers that were frozen.

    Raises `ValueError` where no layer is meant, and where a layer was told something since that
    it cannot keep, `TypeError` where its class has been replaced. Then nothing is changed.
    """
    layers = _meant(model, where)
    frozen = {path: layer for path, layer in layers.items() if is_frozen(layer)}
    with _undone_on_failure(model, frozen.values()):
        for layer in frozen.values():
            thaw(layer)
    return tuple(frozen)


def _meant(model: nn.Module, where: Where) -> dict[str, TorchBatchNorm]:
    """The layers that are meant, by path, none of them lazy."""
    found = batch_norms(model)
    layers = {path: layer for path, layer in found.items() if is_meant(path, layer, where)}
    if not layers:
        there = f"where={where!r} means none of them: {_names(found)}" if found else "it has none"
        raise ValueError(f"freeze and unfreeze need batch norms of the model; {there}")
    lazy = [path for path, layer in layers.items() if any(map(is_lazy, _tensors(layer)))]
    if lazy:
        raise ValueError(
            f"{_names(lazy)}: lazy, with neither class nor statistics of their own yet; run a "
            "batch through the model in eval mode before"
        )
    return layers


def _check_statistics(layers: dict[str, TorchBatchNorm]) -> None:
    """Refuse running statistics that cannot be normalized by."""
    missing = [path for path, layer in layers.items() if layer.running_mean is None]
    if missing:
        raise ValueError(
            f"{_names(missing)}: no running statistics to use; make the layers with "
            "track_running_stats=True and recalibrate them, leave them out with where=, or freeze "
            'with statistics="batch"'
        )
    broken = [path for path, layer in layers.items() if not all(map(_is_finite, layer.buffers()))]
    if broken:
        raise ValueError(
            f"{_names(broken)}: running statistics that are not finite, by which every output "
            "would be NaN; load sound ones, or recalibrate the model, before freezing"
        )


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


@contextmanager
def _undone_on_failure(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what a model was, and which of the layers' parameters learned."""
    parameters = [p for layer in layers for p in layer.parameters()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        with undone_on_failure(model):
            yield
    except BaseException:
        for parameter, learned, gradient in before:
            parameter.requires_grad_(learned).grad = gradient
        raise


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _names(paths: Iterable[str]) -> str:
    """Paths in one line, of many the first."""
    return listed([*map(shown, paths)])

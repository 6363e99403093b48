"""Which layers to recalibrate, and which were frozen on purpose."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.models.norms import TorchBatchNorm, Where, batch_norms, is_meant
from batchnorm.repair.adaptation.statistics import is_adapted
from batchnorm.repair.freezing.layers import Switches
from batchnorm.repair.table import shown

__all__ = ["recalibrated_and_frozen"]


def recalibrated_and_frozen(
    model: nn.Module, where: Where
) -> tuple[dict[str, TorchBatchNorm], tuple[str, ...]]:
    """The layers to recalibrate, by path; and the paths of those that were frozen on purpose.

    Raises `ValueError` where there is nothing to recalibrate, a tensor has no values, or a layer
    is adapted.
    """
    _check_has_values(model)
    _check_not_adapted(model)
    kept = {
        path: layer
        for path, layer in batch_norms(model).items()
        if layer.running_mean is not None and layer.running_var is not None
    }
    meant = {path: layer for path, layer in kept.items() if is_meant(path, layer, where)}
    trains = _trains(model)
    frozen = tuple(path for path, layer in meant.items() if _is_frozen(layer, trains))
    layers = {path: layer for path, layer in meant.items() if path not in frozen}
    if layers:
        return layers, frozen
    if frozen:
        raise ValueError(
            f"every batch norm layer meant is frozen ({', '.join(map(shown, frozen[:3]))}, …): by "
            "freeze(), with track_running_stats=False, with statistics that do not move the "
            "running ones, or in eval mode while the model trains. unfreeze() those to be "
            "recalibrated; or call model.eval() first, where it is a model for inference"
        )
    if kept:
        raise ValueError(f"where={where!r} means none of the batch norm layers {list(kept)}")
    raise ValueError(
        f"{type(model).__name__} has no batch norm layer with running statistics: there is "
        "nothing to recalibrate; construct its layers with track_running_stats=True"
    )


def _trains(model: nn.Module) -> bool:
    """Whether anything is in training that learns or tracks.

    Dropout alone is how people sample at inference, and a wrapper is born in training mode.
    """
    return any(
        module.training
        and (isinstance(module, TorchBatchNorm) or any(True for _ in module.parameters(False)))
        for module in model.modules()
    )


def _is_frozen(layer: TorchBatchNorm, trains: bool) -> bool:
    """Whether training leaves the layer's statistics alone; γ and β are another matter."""
    return not Switches.of(layer).updates or (trains and not layer.training)


def _check_not_adapted(model: nn.Module) -> None:
    """Adapted layers move their inputs by what they remember, and would remember the batches."""
    for path, layer in batch_norms(model).items():
        if is_adapted(layer):
            raise ValueError(
                f"{shown(path)!r} is adapted to what it is given, so that its statistics would "
                "not be those of the batches; remove() the adaptation first"
            )


def _check_has_values(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"{name} has no shape yet, its module is lazy; call the model with one batch first"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values; load the weights first"
            )

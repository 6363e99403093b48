"""Ported weights and the model they are for: which layer is whose, and whether all fits."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.snapshot import undone_on_failure
from batchnorm.repair.porting.kernels import is_kernel
from batchnorm.repair.porting.layers import is_norm
from batchnorm.repair.porting.reading import Layer, bare_names
from batchnorm.repair.porting.sources import FLAX, Source
from batchnorm.repair.table import listed

__all__ = ["SHOWN", "Settings", "Target", "in_order", "settings_of"]

SHOWN = 5  # names in a line


class Settings(NamedTuple):
    """A batch norm's ε and momentum, in PyTorch's sense."""

    eps: float
    momentum: float | None


def settings_of(module: nn.Module | None) -> Settings | None:
    """A layer's own; None where it has no ε. FrozenBatchNorm2d has no momentum."""
    eps = getattr(module, "eps", None)
    return None if eps is None else Settings(eps, getattr(module, "momentum", None))


class Target:
    """A model that weights are ported to: its layers and tensors by path, without wrappers.

    Raises `ValueError` for one without values yet: lazy, or on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state: dict[str, Any] = model.state_dict(keep_vars=True)
        for name, value in self.state.items():
            if is_lazy(value):
                raise ValueError(f"{name} has no shape yet; give the model an example first")
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{name} lies on the meta device, where nothing can be loaded; call "
                    'model.to_empty(device="cpu") first'
                )
        self.names = {bare: name for name, bare in bare_names(self.state).items()}
        modules = dict(model.named_modules(remove_duplicate=False))
        self.modules = {
            bare.rpartition(".")[0]: modules[name.rpartition(".")[0]]
            for bare, name in self.names.items()
            if name.rpartition(".")[0] in modules
        }

    def fitted(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
        """The values of all of the model's tensors, each checked against what it replaces.

        Raises `ValueError` for shapes that differ, for names that only one side has, and for
        values that the model's dtype cannot hold.
        """
        given: dict[int, Any] = {}  # a tensor that has two names needs to be given under one
        for bare, value in values.items():
            if bare in self.names:
                self._check(bare, value, origins.get(bare, "what was filled in"))
                given[id(self.state[self.names[bare]])] = value
        unexpected = [bare for bare in values if bare not in self.names]
        missing = [name for name, own in self.state.items() if id(own) not in given]
        if unexpected or missing:
            raise ValueError(_mismatch(unexpected, missing, origins))
        return {
            bare: values.get(bare, given[id(self.state[name])]) for bare, name in self.names.items()
        }

    def copied(self) -> dict[str, Any]:
        """The values of all of the model's tensors as they are now, and its extra states."""
        return {bare: _copy(self.state[name]) for bare, name in self.names.items()}

    def load(self, values: Mapping[str, Any], settings: Mapping[str, Settings]) -> None:
        """Give the model the values and its batch norms their settings: all or nothing."""
        state = {self.names[bare]: value for bare, value in values.items()}
        with undone_on_failure(self.model, parameters=True):
            self.model.load_state_dict(state)
            for path, (eps, momentum) in settings.items():
                for name, value in (("eps", eps), ("momentum", momentum)):
                    if hasattr(self.modules[path], name):
                        setattr(self.modules[path], name, value)

    def _check(self, bare: str, value: Any, origin: str) -> None:
        own = self.state[self.names[bare]]
        if not isinstance(value, Tensor) or not isinstance(own, Tensor):
            return
        if tuple(own.shape) != tuple(value.shape):
            raise ValueError(
                f"{origin} is {tuple(value.shape)} in PyTorch's layout, and the model's "
                f"{self.names[bare]!r} {tuple(own.shape)}; make the model with the same sizes, or "
                "say with `renamed` which layer is whose"
            )
        if value.is_floating_point() and own.is_floating_point() and own.dtype != value.dtype:
            held = value.to(own.dtype).float().isfinite()
            if not held.all() and value.double().isfinite().all():
                raise ValueError(
                    f"{origin} reaches {value.abs().max():.3g}, which the model's {own.dtype} "
                    "cannot hold; port to the model in float32"
                )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)


def in_order(layers: Mapping[str, Layer], target: Target, source: Source) -> dict[str, str]:
    """The path in the model of each layer: the first is the first, and so on.

    Raises `ValueError` at the first two layers of different kinds, for different numbers of
    layers, and for Flax, whose order is not kept.
    """
    if source is FLAX:
        raise ValueError(
            "by_order needs the order in which layers were made, and JAX sorts a Flax network's by "
            "name; say with `renamed` which layer is whose"
        )
    first: dict[int, str] = {}  # a module that lies at two places is one layer
    for path, module in target.modules.items():
        first.setdefault(id(module), path)
    paths = list(first.values())
    places = dict(zip(layers, paths, strict=False))
    for number, (old, new) in enumerate(places.items(), 1):
        theirs, ours = _kind(layers[old], source), _kind_of_module(target.modules[new])
        if theirs != ours:
            raise ValueError(
                f"by_order: layer {number} is {theirs} in {source.title}, {old!r}, and {ours} in "
                f"the model, {new!r}; define the layers in the same order, or say with `renamed` "
                "which is whose"
            )
    if len(layers) != len(paths):
        rest = list(layers)[len(paths) :] + paths[len(layers) :]
        raise ValueError(
            f"by_order: {source.title} has {len(layers)} layers with weights, and the model "
            f"{len(paths)}; without a partner: {listed(rest, SHOWN)}"
        )
    return places


def _kind(layer: Layer, source: Source) -> str:
    if is_norm(layer, source):
        return "a batch norm"
    for last, (_, value) in layer.items():
        if source.names.get(last) == "weight" or is_kernel(last, value):
            return _kind_of_weight(value)
    return "a layer without weight"


def _kind_of_module(module: nn.Module) -> str:
    if isinstance(getattr(module, "running_mean", None), Tensor):
        return "a batch norm"
    weight = getattr(module, "weight", None)
    return _kind_of_weight(weight) if isinstance(weight, Tensor) else "a layer without weight"


def _kind_of_weight(weight: Tensor) -> str:
    return f"a layer whose weight has {weight.ndim} dimensions"


def _mismatch(unexpected: list[str], missing: list[str], origins: Mapping[str, str]) -> str:
    parts = []
    if unexpected:
        named = [f"{bare} ({origins[bare]})" if bare in origins else bare for bare in unexpected]
        parts.append(f"it has no place for {listed(named, SHOWN)}")
    if missing:
        parts.append(f"nothing was given for its {listed(missing, SHOWN)}")
    return (
        f"the weights do not fit the model: {', and '.join(parts)}; say with `renamed` which layer "
        "is whose"
    )

"""Weights of other frameworks in PyTorch, with what their batch norms mean by ε and momentum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.repair.porting.kernels import LINEAR
from batchnorm.repair.porting.layers import Ported, is_norm, port_layer, unbiased
from batchnorm.repair.porting.models import SHOWN, Settings, Target, in_order, settings_of
from batchnorm.repair.porting.options import Renamed, by_layer, renamed_paths
from batchnorm.repair.porting.reading import Layer, read
from batchnorm.repair.porting.sources import SOURCES, TORCH, Framework, Source
from batchnorm.repair.table import counted, listed, shown, table

__all__ = ["PortedNorm", "Porting", "Settings", "port"]


def port(
    state_dict: Mapping[Any, Any],
    source: Framework,
    *,
    model: nn.Module | None = None,
    renamed: Renamed = None,
    by_order: bool = False,
    eps: float | Mapping[str, float] | None = None,
    momentum: float | Mapping[str, float] | None = None,
    values_per_channel: int | Mapping[str, int] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
) -> Porting:
    """Give the weights of a Keras or Flax network torch.nn's names, layouts and conventions.

    momentum = 1 − (Keras's or Flax's),  which is the share of the old value there: 0.99 is 0.01

    ```python
    weights = {v.path: v.numpy() for v in keras_model.variables}
    port(weights, "keras").state_dict                       # "conv2d.weight", …
    port(weights, "keras", model=net, by_order=True)        # loads them, sets eps and momentum
    port(variables, "flax", model=net, renamed={"Conv_0": "conv", "BatchNorm_0": "norm"})
    port(weights, "keras", eps={bn.path: bn.epsilon for bn in keras_batch_norms})
    port(torch.load("ddp.pt"), "torch", model=net)          # "module." and "_orig_mod." off
    port(weights, "keras", model=net, by_order=True).undo()
    ```

    ε and momentum are no weights, and a state does not hold them: where they are not passed they
    are taken for the framework's defaults, 0.001 and 0.99 in Keras, 1e-5 and 0.99 in Flax; from
    PyTorch to a model they stay the model's. The running variance of Keras and Flax follows the
    biased variances of the batches, PyTorch's the unbiased ones; it is kept as it is, so that the
    network answers as it did, unless `values_per_channel` is given.

    Kernels become weights: (*positions, in, out) turns into (out, in, *positions). `model` tells
    which are depthwise or transposed; without one the layer's name does, where it says so. A Flax
    `ConvTranspose` is taken for one with `transpose_kernel=False`. A separable convolution
    becomes two, `depthwise` and `pointwise`. How a convolution pads is not among its weights:
    "same" with a stride pads otherwise than PyTorch does.

    - `state_dict`: names and arrays, flat or nested: `{v.path: v.numpy() for v in
      model.variables}` of Keras; `{"params": …, "batch_stats": …}` of flax.linen, or a pure
      dictionary of flax.nnx; a PyTorch state. It is not changed.
    - `source`: "keras", "flax" or "torch".
    - `model`: where to load the ported weights, strictly; its batch norms are given ε and
      momentum. If anything does not fit, nothing is loaded. What it held before is kept for
      `undo`, as long as the result is.
    - `renamed`: PyTorch's paths for the source's: leading segments and what to put for them, "" for
      nothing, or a function of the path, whose segments have dots between them.
    - `by_order`: the first layer with weights is the model's first, and so on, whatever they are
      called; kinds and shapes must agree. Two like layers that changed places are not noticed.
    - `eps`, `momentum`: those of the source's batch norms, in the source's sense, for all or by
      path.
    - `values_per_channel`: n, batch size × positions in training, for all batch norms or by path;
      the running variance is multiplied by n / (n − 1).
    - `flattened`: by the path of a linear layer or batch norm behind a Flatten, the shape before
      it, (*positions, channels): PyTorch flattens the channels first.

    Returns what was ported and how; see `Porting`.

    Raises `ValueError` for an unknown source, a batch norm without mean or variance, shapes that
    do not fit, values that are not finite, a variance with variance + ε ≤ 0, and a path that is
    none; `TypeError` for what is no mapping of names to arrays.
    """
    conventions = _conventions(source)
    reading = read(state_dict, conventions)
    options = _options(
        reading.layers,
        conventions,
        eps=eps,
        momentum=momentum,
        values_per_channel=values_per_channel,
        flattened=flattened,
    )
    if by_order and (model is None or renamed is not None):
        raise ValueError("by_order needs a `model` whose order to follow, and no `renamed`")
    target = None if model is None else _target(model)
    if by_order and target is not None:
        places = in_order(reading.layers, target, conventions)
    else:
        places = renamed_paths(reading.layers, renamed, conventions)
    modules = {} if target is None else target.modules
    before = None if target is None else _Before(target.model, target.copied())
    porting = Porting(conventions.title, dropped=reading.dropped, _before=before)
    for path, layer in reading.layers.items():
        place = places[path]
        _port_into(porting, place, path, layer, modules.get(place), options, conventions)
    porting = replace(porting, unflattened=_unflattened(porting, flattened or {}))
    if target is not None:
        porting.state_dict.update(target.fitted(porting.state_dict, porting.names))
        settings = {place: norm.settings for place, norm in porting.norms.items()}
        target.load(porting.state_dict, settings)
    return porting


def _unflattened(porting: Porting, flattened: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Linear layers beside convolutions whose features may come in another order."""
    if flattened or all(kind == LINEAR for kind in porting.kernels.values()):
        return ()
    return tuple(n for n, kind in porting.kernels.items() if kind == LINEAR)


@dataclass(frozen=True, eq=False, repr=False)
class Porting:
    """Weights by torch.nn's names, and what was done to them.

    All names are without those of wrappers such as DDP and torch.compile, around a model too.

    - `source`: the framework they are from.
    - `state_dict`: what `load_state_dict` takes.
    - `norms`: each batch norm by its path in PyTorch.
    - `names`: what the source calls the tensor of each name.
    - `filled`: names that the source has nothing for: γ = 1, β = 0, a count of 0 batches.
    - `kernels`: by name, which layer a kernel is of that was turned.
    - `unchanged`: names of what is not known here and was passed on as it was.
    - `dropped`: the source's names of what is no weight, such as the state of a generator.
    - `unflattened`: linear layers of a network with convolutions that were taken for such as have
      no Flatten before them, since `flattened` did not name them.
    """

    source: str
    state_dict: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, PortedNorm] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    dropped: tuple[str, ...] = ()
    unflattened: tuple[str, ...] = ()
    _before: _Before | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Give the model the values back that it had, and its batch norms their ε and momentum.

        Raises `ValueError` where there was no model, `RuntimeError` where its tensors have other
        names or shapes by now. Then nothing is changed.
        """
        if self._before is None:
            raise ValueError(
                "nothing to undo: the weights were loaded into no model, since port was given none"
            )
        model, values = self._before
        settings = {place: norm.before for place, norm in self.norms.items() if norm.before}
        Target(model).load(values, settings)

    def __repr__(self) -> str:
        sizes = counted(len(self.norms), "batch norm"), counted(len(self.names), "tensor")
        title = f"Porting from {self.source}: {', '.join(sizes)}"
        rows = [
            (
                shown(place),
                norm.path,
                *(_change(norm, setting) for setting in Settings._fields),
            )
            for place, norm in self.norms.items()
        ]
        lines = [table(title, ("layer", f"in {self.source}", "eps", "momentum"), rows)]
        kinds = Counter(self.kernels.values())
        said = {
            "kernels turned": [counted(n, kind) for kind, n in kinds.items()],
            "filled in": [n for n in self.filled if not n.endswith("num_batches_tracked")],
            "passed on unchanged": self.unchanged,
            "dropped": self.dropped,
            "wrong if behind a Flatten, say so by flattened=": self.unflattened,
        }
        lines += [f"  {what}: {listed(names, SHOWN)}" for what, names in said.items() if names]
        return "\n".join(lines)


class PortedNorm(NamedTuple):
    """A batch norm: its path in the source, its settings, and those that the model had before."""

    path: str
    settings: Settings
    before: Settings | None


class _Before(NamedTuple):
    """A model, and the values that it had, by names without those of wrappers."""

    model: nn.Module
    values: dict[str, Any]


class _Options(NamedTuple):
    """What was said of layers, by path."""

    eps: dict[str, float]
    momentum: dict[str, float]
    values_per_channel: dict[str, int]
    flattened: dict[str, Sequence[int]]


def _conventions(source: Framework) -> Source:
    if source not in SOURCES:
        known = ", ".join(map(repr, SOURCES))
        raise ValueError(f"source must be one of {known}, got {source!r}")
    return SOURCES[source]


def _target(model: nn.Module) -> Target:
    if not isinstance(model, nn.Module):
        raise TypeError(f"port takes a torch.nn.Module as model, got {type(model).__name__}")
    return Target(model)


def _options(layers: Mapping[str, Layer], source: Source, **said: Any) -> _Options:
    """The options by path, each checked; there is a batch norm they can speak of."""
    norms = [path for path, layer in layers.items() if is_norm(layer, source)]
    if not norms:
        names = " and ".join(repr(k) for k, v in source.names.items() if v.startswith("running_"))
        raise ValueError(
            f"no batch norm among {len(layers)} layers: none has {names}; for {source.title} pass "
            f"{source.everything}, which holds more than what is trained"
        )
    if said["values_per_channel"] is not None and not source.is_biased:
        raise ValueError(
            f"values_per_channel: the running variance of {source.title} is unbiased already"
        )
    options = _Options(
        eps=by_layer("eps", said["eps"], norms, source),
        momentum=by_layer("momentum", said["momentum"], norms, source),
        values_per_channel=by_layer(
            "values_per_channel", said["values_per_channel"], norms, source
        ),
        flattened=by_layer("flattened", said["flattened"], layers, source),
    )
    for path, eps in options.eps.items():
        if not 0 <= eps < math.inf:
            raise ValueError(
                f"eps is added to a variance and must not be negative, got {eps} for {path}"
            )
    for path, momentum in options.momentum.items():
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is a share, from 0 to 1, got {momentum} for {path}")
    return options


def _port_into(
    porting: Porting,
    place: str,
    path: str,
    layer: Layer,
    module: nn.Module | None,
    options: _Options,
    source: Source,
) -> None:
    """Add a layer to what is ported, at its place."""
    ported = port_layer(path, layer, source, module, options.flattened.get(path))
    if is_norm(layer, source):
        norm = PortedNorm(path, _settings(path, options, source, module), settings_of(module))
        _check_variance(ported, norm)
        if path in options.values_per_channel:
            var, n = ported.values["running_var"], options.values_per_channel[path]
            ported.values["running_var"] = unbiased(path, var, n)
        porting.norms[place] = norm
    inside = f"{place}." if place else ""
    for last, value in ported.values.items():
        name = inside + last
        if name in porting.state_dict:
            raise ValueError(
                f"{porting.names.get(name, path)} and {ported.names.get(last, path)} would both be "
                f"{name!r}; give their layers different names with `renamed`"
            )
        porting.state_dict[name] = value
        if last in ported.names:
            porting.names[name] = ported.names[last]
        else:
            porting.filled.append(name)
    if ported.kernel is not None:
        porting.kernels[f"{inside}weight"] = ported.kernel
    porting.unchanged.extend(inside + last for last in ported.unchanged)


def _settings(path: str, options: _Options, source: Source, module: nn.Module | None) -> Settings:
    """As said; else PyTorch's layers keep the model's, and others have their source's defaults."""
    before = settings_of(module) if source is TORCH else None
    eps, momentum = before or (source.eps, source.torch_momentum(source.momentum))
    if path in options.momentum:
        momentum = source.torch_momentum(options.momentum[path])
    return Settings(options.eps.get(path, eps), momentum)


def _check_variance(ported: Ported, norm: PortedNorm) -> None:
    var: Tensor = ported.values["running_var"]
    bad = var.double() + norm.settings.eps <= 0
    if bad.any():
        raise ValueError(
            f"{ported.names['running_var']} is {var.min():.3g} in one of {int(bad.sum())} channels "
            f"where variance + eps ≤ 0 (eps {norm.settings.eps:g}), and 1/√(variance + eps) no "
            "number; pass the eps of the source's layer, or look where the variance was lost"
        )


def _change(norm: PortedNorm, setting: str) -> str:
    """A setting, and where the model had another one, that before it."""
    now = _number(getattr(norm.settings, setting))
    before = now if norm.before is None else _number(getattr(norm.before, setting))
    return now if before == now else f"{before} → {now}"


def _number(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"

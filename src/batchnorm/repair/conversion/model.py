"""Convert the norms of a model: see `convert`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.kernels import IDENTITY, Activation
from batchnorm.layers import DomainBatchNorm
from batchnorm.layers.base import BatchNorm
from batchnorm.models.calling import Forward
from batchnorm.models.compiled import original
from batchnorm.models.norms import Where, is_meant
from batchnorm.repair.conversion.biases import biased, cancelling, drop_bias, is_before_norm
from batchnorm.repair.conversion.form import Form, become, revert
from batchnorm.repair.conversion.fusion import Fusion, fused_activation, groups, unfused_activation
from batchnorm.repair.conversion.observation import Observation, difference, tolerance
from batchnorm.repair.conversion.optimizer import release
from batchnorm.repair.conversion.order import Order, is_lazy_model
from batchnorm.repair.conversion.result import Conversion
from batchnorm.repair.conversion.source import FUSED, Refused, Source, is_norm, understood
from batchnorm.repair.conversion.target import LOSSLESS, TARGETS, Options, Plan
from batchnorm.statistics import Statistics

__all__ = ["convert"]

_DROP_BIAS = "drop_bias"


def convert(
    model: nn.Module,
    *,
    to: str | Statistics,
    where: Where = None,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any | None = None,
    forward: Forward | None = None,
    fuse: bool = False,
    groups: int | None = None,
    process_group: Any | None = None,
) -> Conversion:
    """Make a model's batch norms layers of another kind, where they stand.

    ```python
    convert(model, to="batchnorm")              # torch.nn's become this library's
    convert(model, to=Ghost(32))                # with a policy
    convert(model, to="batchnorm", fuse=True)   # and take over the ReLUs behind them
    convert(model, to="torch")                  # and back
    convert(model, to="group_norm").undo()
    convert(model, to="drop_bias", optimizer=optimizer)
    ```

    Each layer stays the same object with another class, so that hooks, references to it and the
    parameters that an optimizer holds stay; mode, ε, momentum, counter, dtype, device and
    what its user put on it do too. Among batch norms nothing is lost: a layer remembers what it
    was first, in copies and pickles too, and has that class and state_dict again when it is
    converted back.

    - `to`: what to make of them.
      - "batchnorm": this library's, and with a policy such as `Ghost(32)` those; torchvision's
        FrozenBatchNorm2d frozen, timm's BatchNormAct2d with its activation.
      - "torch": `torch.nn`'s BatchNorm1d, 2d or 3d; "sync": `torch.nn.SyncBatchNorm`.
      - "original": what each was before it was converted first.
      - "group_norm": `torch.nn.GroupNorm`; "instance_norm": `torch.nn.InstanceNorm`;
        "layer_norm" and "rms_norm": `torch.nn`'s over the channels of each position, as in
        ConvNeXt (for all positions of a sample at once, "group_norm" with `groups=1`);
        "identity": nothing. They keep γ, β and ε as far as they have them. A trained model
        needs fine-tuning then.
      - "drop_bias": no batch norms, but the biases of convolutions and linear layers that every
        batch norm behind them takes out again; running means are corrected.
    - `where`: which layers, by path; see `Where`. By default all. Of "drop_bias", the biased ones.
    - `optimizer`: one that holds the model's parameters; those that the model has no more leave
      it. All others stay the same objects.
    - `example`: an input of the model. With it outputs are compared, and what the
      modules do not tell is seen: how many dimensions a SyncBatchNorm's input has, or the order
      of operations that torch.fx cannot trace.
    - `forward`: how to call the model with the example, if not as `model(example)`.
    - `fuse`: with this library's layers, have each take over the activation module behind it,
      where that takes nothing else. Calls of functions are no modules and stay.
    - `groups`: of a GroupNorm, 32 if not given: the largest divisor of the channels up to that
      which leaves at least two channels in a group.
    - `process_group`: of a SyncBatchNorm.

    Returns what was done. A layer that does what its class does not tell, a subclass with a forward
    of its own say, is left as it is, with the reason. On any failure so is the whole model.

    Raises `ValueError` for an unknown `to`, an option of another target, a `where` that means no
    layer, and where only an example could tell; `TypeError` for what is no module, policy or
    optimizer; `RuntimeError` where outputs on the example differ by more than rounding though
    nothing should be lost.
    """
    name, options = _asked(to, fuse, groups, process_group)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"convert takes a torch.nn.Module that is not scripted, got {type(model).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    model = original(model)
    norms = [module for module in model.modules() if is_norm(module)]
    # a pass would make a lazy layer an ordinary one
    watched = example is not None and not is_lazy_model(model)
    seen = Observation.of(model, example, forward, norms) if watched else None
    before = list(model.parameters())
    with ExitStack() as undo:
        work = _Work(model, None if seen is None else seen.shapes, undo)
        if name == _DROP_BIAS:
            meant = _meant(model, where, biased, "biased layers")
            work.drop_biases(meant, example, forward, is_named=where is not None)
        else:
            meant = _meant(model, where, is_norm, "batch norms")
            work.convert(meant, name, options)
            if fuse:
                work.fuse(Order(model, example, forward))
            work.apply()
        after = {id(parameter) for parameter in model.parameters()}
        if optimizer is not None:
            release(optimizer, [p for p in before if id(p) not in after], undo)
        differs = None
        if seen is not None:
            now = Observation.of(model, example, forward, ())
            differs = difference(seen.outputs, now.outputs)
            if name in (*LOSSLESS, _DROP_BIAS) and not differs <= tolerance(seen.outputs):
                raise RuntimeError(
                    f"converting to {to} changes the outputs on the example by {differs:.2g} of "
                    "the largest, more than rounding does; the model is as it was. A forward that "
                    "reads its layers' attributes, or calls different ones from time to time, can "
                    "do that: leave those layers out with where=..."
                )
        return Conversion(
            to=str(to),
            converted=work.converted,
            skipped=work.skipped,
            fused=work.fused,
            unfused=work.unfused,
            lost=work.lost,
            parameters=(_count(before), _count(list(model.parameters()))),
            difference=differs,
            needs_fine_tuning=work.needs_fine_tuning,
            _undo=undo.pop_all(),
        )


def _asked(
    to: str | Statistics, fuse: bool, groups: int | None, process_group: Any | None
) -> tuple[str, Options]:
    """The name of the target, and what is to be known of it."""
    if isinstance(to, Statistics):
        name, options = "batchnorm", Options(to)
    elif isinstance(to, str) and to in (*TARGETS, _DROP_BIAS):
        name, options = to, Options()
    elif isinstance(to, str):
        names = ", ".join(map(repr, (*TARGETS, _DROP_BIAS)))
        raise ValueError(f"to must be one of {names}, or a policy such as Ghost(32); got {to!r}")
    else:
        raise TypeError(
            f"to must be a name such as 'torch' or a policy such as Ghost(32); got {to!r}"
        )
    for option, given, target in (
        ("fuse", fuse or None, "batchnorm"),
        ("groups", groups, "group_norm"),
        ("process_group", process_group, "sync"),
    ):
        if given is not None and name != target:
            raise ValueError(f"{option}= is an option of to={target!r}, got it with to={to!r}")
    if groups is not None and groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    return name, options._replace(groups=groups or options.groups, process_group=process_group)


def _meant(
    model: nn.Module, where: Where, is_one: Callable[[nn.Module], bool], what: str
) -> dict[nn.Module, str]:
    """The modules that are meant, each once, by the first of its paths."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_one(module):
            paths.setdefault(module, []).append(path)
    meant = {m: at[0] for m, at in paths.items() if any(is_meant(path, m, where) for path in at)}
    if where is not None and paths and not meant:
        known = ", ".join(repr(at[0]) for at in list(paths.values())[:6])
        raise ValueError(f"where={where!r} means none of the model's {len(paths)} {what}: {known}")
    return meant


@dataclass
class _Work:
    """A conversion while it is planned and done."""

    model: nn.Module
    shapes: dict[nn.Module, list[torch.Size]] | None
    undo: ExitStack
    paths: dict[nn.Module, str] = field(default_factory=dict)
    sources: dict[nn.Module, Source] = field(default_factory=dict)
    plans: dict[nn.Module, Plan] = field(default_factory=dict)
    restored: set[nn.Module] = field(default_factory=set)
    replaced: dict[nn.Module, tuple[nn.Module, ...]] = field(default_factory=dict)
    converted: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    needs_fine_tuning: bool = False

    def convert(self, meant: dict[nn.Module, str], name: str, options: Options) -> None:
        """Plan what each norm becomes."""
        self.paths = meant
        domains = [m for m in self.model.modules() if isinstance(m, DomainBatchNorm)]
        of_domains = {layer for each in domains for layer in each.modules()}
        for module, path in meant.items():
            try:
                source = understood(module)
                if module in of_domains and name not in ("batchnorm", "original"):
                    raise Refused("its DomainBatchNorm gives it a residual and a mask")
            except Refused as reason:
                self.skipped[path] = str(reason)
                continue
            if self.shapes is not None:
                source.shapes = tuple(self.shapes.get(module, ()))
            self.sources[module] = source
        if name != "batchnorm":
            self._unfuse(name, options)
        for module in self.sources:
            if module not in self.plans and self.paths[module] not in self.skipped:
                self._plan(module, name, options)

    def _plan(self, module: nn.Module, name: str, options: Options) -> bool:
        source = self.sources[module]
        try:
            self.plans[module] = TARGETS[name](source, options)
        except Refused as reason:
            self.skipped[self.paths[module]] = str(reason)
            return False
        return True

    def _unfuse(self, name: str, options: Options) -> None:
        """Give activations back that norms have taken over, where all norms that have can."""
        for activations, norms in groups(self.sources):
            if not norms <= self.sources.keys():
                continue
            before = {norm: self.sources[norm].act for norm in norms}
            for norm in norms:
                self.sources[norm].act = IDENTITY
            planned = [self._plan(norm, name, options) for norm in norms]
            if all(planned):
                self.restored |= activations
                continue
            for norm in norms:
                self.sources[norm].act = before[norm]
                self.plans.pop(norm, None)
                why = "it shares an activation with a norm that cannot be converted"
                self.skipped.setdefault(self.paths[norm], why)

    def fuse(self, order: Order) -> None:
        """Plan which activations the norms take over."""
        fusion = Fusion.of(order, {norm: self.sources[norm] for norm in self.plans})
        for norm, reason in fusion.refused.items():
            self.unfused[self.paths[norm]] = reason
        for norm, activations in fusion.activations.items():
            act = Activation.of(activations[0])
            form = self.plans[norm].form
            settings = {**form.settings, "act": act, FUSED: activations}
            self.plans[norm] = replace(self.plans[norm], form=replace(form, settings=settings))
            self.fused[self.paths[norm]] = str(act)
        self.replaced = {act: fusion.norms(act) for act in fusion.all_activations()}

    def apply(self) -> None:
        """Do what is planned."""
        for module, plan in self.plans.items():
            source, path = self.sources[module], self.paths[module]
            if plan.form is source.form or _is_same(plan.form, source.form):
                continue
            before = _text(module)
            if plan.is_lossy:
                self.needs_fine_tuning |= source.was_trained
            self._become(module, source.form, plan.form)
            if plan.is_frozen:
                assert isinstance(module, BatchNorm)
                module.freeze()
            self.converted[path] = (before, _text(module))
            if plan.lost:
                self.lost[path] = ", ".join(plan.lost)
        for activation, norms in self.replaced.items():
            self._become(activation, *fused_activation(activation, norms))
        for activation in self.restored:
            self._become(activation, *unfused_activation(activation))

    def _become(self, module: nn.Module, now: Form, then: Form) -> None:
        self.undo.callback(_revert, module, now, then)
        become(module, now, then)

    def drop_biases(
        self,
        meant: dict[nn.Module, str],
        example: Any | None,
        forward: Forward | None,
        *,
        is_named: bool,
    ) -> None:
        """Take out the biases that batch norms take out again.

        - `is_named`: whether the layers were asked for, so that each is told of.
        """
        if not meant:
            return
        order = Order(self.model, example, forward)
        cancelled = {}
        for layer, path in meant.items():
            if not is_named and not is_before_norm(order, layer):
                continue
            try:
                cancelled[layer] = cancelling(order, layer, self.shapes)
            except Refused as reason:
                self.skipped[path] = str(reason)
        for layer, norms in cancelled.items():
            was = f"{type(layer).__name__} with a bias of {len(layer.bias)}"  # type: ignore[arg-type]
            drop_bias(layer, norms, self.undo)
            self.converted[meant[layer]] = (was, f"{type(layer).__name__} without")


def _revert(module: nn.Module, was: Form, then: Form) -> None:
    frozen_since = getattr(module, "_thawed", None) and not was.settings.get("_thawed")
    if frozen_since and isinstance(module, BatchNorm):
        module.unfreeze()  # or its parameters would never learn again
    revert(module, was, then)
    weight = module._parameters.get("weight")
    if issubclass(was.kind, BatchNorm) or weight is None or weight.dtype.itemsize >= 4:
        return
    for name, buffer in was.buffers.items():  # the model has half the precision since
        if buffer is not None and buffer.is_floating_point():
            module._buffers[name] = getattr(module, name).to(weight.dtype)


def _is_same(one: Form, other: Form) -> bool:
    """Whether two forms are the same, with the same tensors."""
    tensors, others = one.tensors, other.tensors
    return (
        one.kind is other.kind
        and one.settings == other.settings
        and tensors.keys() == others.keys()
        and all(tensor is others[name] for name, tensor in tensors.items())
    )


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if not is_lazy(p))


def _text(module: nn.Module) -> str:
    """A layer as one writes it, as far as it matters here."""
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    prefix = {"torch": "torch.nn.", "batchnorm": "batchnorm."}.get(package, "")
    if isinstance(module, nn.GroupNorm):
        return f"{prefix}{kind.__name__}({module.num_groups}, {module.num_channels})"
    if isinstance(module, nn.Identity):
        return f"{prefix}Identity()"
    arguments = [str(size) for size in getattr(module, "normalized_shape", ())]
    arguments += [str(module.num_features)] if "num_features" in vars(module) else []
    if isinstance(module, BatchNorm):
        arguments += [module.extra_repr().partition("track_running_stats=")[2].partition(", ")[2]]
    return f"{prefix}{kind.__name__}({', '.join(filter(None, arguments))})"

"""A conversion while it is planned and done."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from batchnorm.kernels import IDENTITY, Activation
from batchnorm.layers.base import BatchNorm
from batchnorm.models.calling import Forward
from batchnorm.models.norms import layers_of_domains
from batchnorm.repair.conversion.biases import cancelling, drop_bias, is_before_norm, is_dropped
from batchnorm.repair.conversion.form import Form, become, is_still, revert
from batchnorm.repair.conversion.fusion import Fusion, fused_activation, groups, unfused_activation
from batchnorm.repair.conversion.order import Order
from batchnorm.repair.conversion.result import Conversion, Made
from batchnorm.repair.conversion.source import FUSED, Refused, Source, understood
from batchnorm.repair.conversion.target import OURS_TOO, TARGETS, Options, Plan

__all__ = ["Work"]


@dataclass
class Work:
    """What a conversion plans, does, and tells of.

    - `shapes`: of the norms' inputs, where an example tells.
    - `undo`: how to undo what is done.
    """

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
    everywhere: dict[nn.Module, str] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)

    def result(
        self,
        to: str,
        parameters: tuple[int, int],
        differs: float | None,
        undo: ExitStack,
    ) -> Conversion:
        """What was done."""
        return Conversion(
            to=to,
            converted=self.converted,
            skipped=self.skipped,
            fused=self.fused,
            unfused=self.unfused,
            lost=self.lost,
            parameters=parameters,
            difference=differs,
            needs_fine_tuning=self.needs_fine_tuning,
            _made=self.made,
            _undo=undo,
        )

    def convert(self, meant: dict[nn.Module, str], name: str, options: Options) -> None:
        """Plan what each norm becomes."""
        self.paths = meant
        of_domains = layers_of_domains(self.model)
        for module, path in meant.items():
            try:
                source = understood(module)
                if module in of_domains and name not in (*OURS_TOO, "original"):
                    raise Refused("its DomainBatchNorm gives it a residual and a mask")
            except Refused as reason:
                self.skipped[path] = str(reason)
                continue
            if self.shapes is not None:
                source.shapes = tuple(self.shapes.get(module, ()))
            self.sources[module] = source
        if name not in OURS_TOO:
            self._unfuse(name, options)
        for module in self.sources:
            if module not in self.plans and self.paths[module] not in self.skipped:
                self._plan(module, name, options)

    @torch.inference_mode(False)  # where no buffer could be tracked that is made
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
        self.everywhere = {module: path for path, module in self.model.named_modules()}
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
        self.made.append(Made(self.everywhere[module], partial(is_still, module, then)))
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
            tracked = [norm for norm in norms if norm.running_mean is not None]
            drop_bias(layer, tracked, self.undo)
            self.made.append(Made(meant[layer], partial(is_dropped, layer, tracked)))
            self.converted[meant[layer]] = (was, f"{type(layer).__name__} without")


def _revert(module: nn.Module, was: Form, then: Form) -> None:
    frozen_since = getattr(module, "_thawed", None) and not was.settings.get("_thawed")
    if frozen_since and isinstance(module, BatchNorm):
        module.unfreeze()  # or its parameters would never learn again
    revert(module, was, then)
    weight = module._parameters.get("weight")
    if issubclass(was.kind, BatchNorm) or weight is None or weight.dtype.itemsize >= 4:
        return
    with torch.inference_mode(False):
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

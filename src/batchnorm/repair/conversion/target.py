"""What a layer becomes, for each thing that `convert` can make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.kernels import IDENTITY
from batchnorm.layers.base import BatchNorm, checked_statistics
from batchnorm.models.norms import TorchBatchNorm, sync_of
from batchnorm.ranks import size_of
from batchnorm.repair.conversion.channel_first import ChannelLayerNorm, ChannelRMSNorm
from batchnorm.repair.conversion.form import COMMON, Form, fresh
from batchnorm.repair.conversion.source import (
    ADOPTED,
    FUSED,
    LAZY_OURS,
    LAZY_TORCH,
    MEMORY,
    OURS,
    TORCH,
    Refused,
    Source,
    new,
)
from batchnorm.statistics import Batch, Running, Statistics, Sync, Untracked

__all__ = ["LOSSLESS", "OURS_TOO", "TARGETS", "Options", "Plan"]


class Options(NamedTuple):
    """What a conversion was told beyond its target."""

    statistics: Statistics | None = None
    groups: int = 32
    process_group: Any = None


@dataclass(frozen=True)
class Plan:
    """The form that a layer takes.

    - `lost`: what has no place in it.
    - `is_frozen`: whether it is frozen then, as the layer was.
    - `is_lossy`: whether it computes something else then.
    """

    form: Form
    lost: tuple[str, ...] = ()
    is_frozen: bool = False
    is_lossy: bool = False


Target = Callable[[Source, Options], Plan]

_WIDE = ("running_mean", "running_var")


def _ours(source: Source, options: Options) -> Plan:
    """This library's layer, with the policy that is asked for, or that it has or had."""
    statistics = options.statistics
    if statistics is None and source.base is nn.SyncBatchNorm:
        statistics = _shared(source)  # as it did before
    kind = source.form.kind
    if not source.is_ours:
        kind = _kind_of(source, LAZY_OURS if source.is_lazy else OURS)
    form = _batch_norm(source, kind)
    settings = {**form.settings, "act": source.act}
    if source.act != IDENTITY and FUSED in source.form.settings:
        settings[FUSED] = source.form.settings[FUSED]
    if source.base is None:
        if statistics not in (None, Running()):
            raise Refused(
                'it is frozen; convert(model, to="batchnorm") and unfreeze() it first, then '
                f"convert(model, to={statistics})"
            )
        settings["num_features"] = source.channels
    elif statistics is not None:
        if settings["_thawed"] is not None:
            raise Refused(f"it is frozen; unfreeze() it before {statistics}")
        tracked = form.buffers.get("running_mean") is not None
        try:
            settings["statistics"] = checked_statistics(statistics, tracked)
        except ValueError as error:
            raise Refused(str(error)) from None
    wide = {name: _wide(form.buffers[name]) for name in _WIDE if name in form.buffers}
    form = replace(form, settings=settings, buffers={**form.buffers, **wide})
    return Plan(_remembering(source, form), is_frozen=source.base is None)


def _torch(source: Source, _: Options) -> Plan:
    """torch.nn's layer for as many dimensions."""
    if source.base in {*TORCH.values(), *LAZY_TORCH.values()} and source.act == IDENTITY:
        return Plan(source.form)
    kind = _kind_of(source, LAZY_TORCH if source.is_lazy else TORCH)
    return _torch_norm(source, kind)


def _sync(source: Source, options: Options) -> Plan:
    """This library's layer, synchronized: over the ranks that are asked for, or that it was."""
    policy, group = source.form.settings.get("statistics"), options.process_group
    if isinstance(policy, Running) and source.form.settings["_thawed"] is None:
        raise Refused(f"statistics={policy} asks for no batch, nor for other ranks'; set Batch()")
    sync = (_shared(source) if group is None else sync_of(source.module)) or Sync()
    if group is not None:
        sync = replace(sync, group=group, neighbours=None)
    statistics = Untracked(sync) if isinstance(policy, Untracked) else sync
    return _ours(source, options._replace(statistics=statistics))


def _shared(source: Source) -> Sync | None:
    """The policy by which the layer shares its statistics with other ranks already."""
    sync = sync_of(source.module)
    if sync is None and source.base is nn.SyncBatchNorm:
        raise Refused(
            f"its process_group, {source.form.settings['process_group']!r}, is none that this "
            "process is in; set it to one, or to None for all ranks"
        )
    return sync


def _torch_sync(source: Source, options: Options) -> Plan:
    """torch.nn.SyncBatchNorm, over the ranks that are asked for, or that it was."""
    source.check_not_lazy()
    group, holds = options.process_group, None
    sync = sync_of(source.module) if source.is_ours else None
    if sync is not None and sync.slices is None and (sync.neighbours is None or size_of(None) > 1):
        group, holds = group or sync.process_group, sync
    told = {} if group is None else {"process_group": group}
    return _torch_norm(source, nn.SyncBatchNorm, holds, **told)


def _torch_norm(
    source: Source, kind: type[nn.Module], holds: Statistics | None = None, **told: Any
) -> Plan:
    """A layer of torch.nn, which holds a policy beside the batch's own, and is told settings."""
    name = f"torch.nn.{kind.__name__}"
    if source.act != IDENTITY:
        raise Refused(f"its activation {source.act} has no place in {name}")
    _check_thawed(source, name)
    form = _batch_norm(source, kind)
    form.settings.update(told)
    lost = []
    statistics = source.form.settings.get("statistics", Batch())
    if statistics not in (Batch(), holds):
        lost.append(f"statistics={statistics}")
    form, rounded = _narrowed(source, form)
    if rounded:
        lost.append(f"running statistics are rounded to {rounded}, which {name} needs here")
    return Plan(_remembering(source, form), tuple(lost))


def _original(source: Source, _: Options) -> Plan:
    """What the layer was before it was converted first."""
    if source.origin is None:
        return Plan(source.form)
    if source.act != source.first_act:
        raise Refused(
            f"its activation {source.act} was fused from a module outside of what is converted; "
            "convert the whole model"
        )
    was_frozen = not issubclass(source.origin.kind, TorchBatchNorm)
    if source.form.settings.get("_thawed") is not None and not was_frozen:
        raise Refused("it is frozen; unfreeze() it first")
    form = source.origin.with_what(source.form)
    return Plan(form if issubclass(form.kind, BatchNorm) else _narrowed(source, form)[0])


def _group_norm(source: Source, options: Options) -> Plan:
    """torch.nn.GroupNorm, with at least two channels in a group."""
    channels = source.channels
    if channels == 1 and (source.positions or 1) == 1:
        raise Refused(
            "its one channel would be normalized by itself, where a sample has one position, to 0; "
            "pass example=... that has more"
        )
    most = max(min(options.groups, channels // 2), 1)
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return _lossy(source, fresh(nn.GroupNorm, groups, channels, affine=source.is_affine))


def _instance_norm(source: Source, _: Options) -> Plan:
    """torch.nn.InstanceNorm for as many dimensions; of more than one position."""
    if source.positions == 1 or (source.dims == 1 and source.positions is None):
        told = "its samples have one position, which would be normalized by itself, to 0"
        raise Refused(told if source.shapes else f"{told}, for all that is known; pass example=...")
    kinds = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    kind = _kind_of(source, kinds)
    return _lossy(source, fresh(kind, source.channels, affine=source.is_affine))


def _layer_norm(source: Source, _: Options) -> Plan:
    """torch.nn.LayerNorm over the channels of each position."""
    bias = source.form.tensors.get("bias") is not None
    channels, affine = _several(source), source.is_affine
    like = fresh(ChannelLayerNorm, channels, elementwise_affine=affine, bias=bias)
    return _lossy(source, like)


def _rms_norm(source: Source, _: Options) -> Plan:
    """torch.nn.RMSNorm over the channels of each position."""
    like = fresh(ChannelRMSNorm, _several(source), elementwise_affine=source.is_affine)
    return _lossy(source, like)


def _identity(source: Source, _: Options) -> Plan:
    """torch.nn.Identity."""
    source.check_not_lazy()
    return _lossy(source, fresh(nn.Identity))


TARGETS: dict[str, Target] = {
    "batchnorm": _ours,
    "torch": _torch,
    "sync": _sync,
    "torch_sync": _torch_sync,
    "original": _original,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "identity": _identity,
}
OURS_TOO = ("batchnorm", "sync")
"""The targets that are this library's layers."""

LOSSLESS = (*OURS_TOO, "torch", "torch_sync", "original")
"""The targets that are batch norms, from which there is a way back."""


def _batch_norm(source: Source, kind: type[nn.Module]) -> Form:
    """A batch norm of another class, with the same tensors and settings.

    A setting that the layer has not is what it was before the layer was converted first.
    """
    like = new(kind)
    remembered = {} if source.origin is None else source.origin.settings
    known = {**like.settings, **remembered, **source.form.settings}
    held = source.form.tensors
    device = next((t.device for t in held.values() if t is not None), None)
    if source.base is None:  # a frozen one counts no batches, and its buffers would not learn
        held = {name: t for name, t in held.items() if t is not None}
        held.setdefault("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))
        affine = {n: nn.Parameter(t) for n in ("weight", "bias") if (t := held[n]) is not None}
        held = {**held, **affine}
    return Form(
        kind,
        {name: known[name] for name in like.settings},
        {n: t for n in like.parameters if n in held and _is_parameter(t := held[n])},
        {name: held[name] for name in like.buffers if name in held},
    )


def _lossy(source: Source, like: Form) -> Plan:
    """A norm of another kind, with the same γ, β and ε as far as it has them."""
    name = f"torch.nn.{like.kind.__name__.removeprefix('Channel')}"
    if source.act != IDENTITY:
        raise Refused(f"its activation {source.act} has no place in {name}")
    if source.base is None:
        raise Refused(
            'its numbers do not learn; convert(model, to="batchnorm") and unfreeze() it first'
        )
    held = source.form.tensors
    settings = dict(like.settings)
    if "eps" in settings:
        settings["eps"] = source.form.settings["eps"]
    parameters = {n: t for n in like.parameters if _is_parameter(t := held.get(n))}
    greek = {"weight": "γ", "bias": "β"}
    lost = [greek[n] for n in greek if held.get(n) is not None and n not in parameters]
    if held.get("running_mean") is not None:
        lost.append("running statistics")
    form = replace(like, settings=settings, parameters=parameters)
    return Plan(form, tuple(lost), is_lossy=True)


def _remembering(source: Source, form: Form) -> Form:
    """The form with what the layer was first; or without, where it is that again."""
    origin = source.origin or source.form.remembered()
    own = [name for name in origin.settings if name not in (*COMMON, MEMORY, ADOPTED)]
    again = all(form.settings.get(name) == origin.settings[name] for name in own)
    if form.kind is origin.kind and again:
        return form
    return replace(form, settings={**form.settings, MEMORY: origin})


def _kind_of(source: Source, kinds: Mapping[int, type[nn.Module]]) -> type[nn.Module]:
    """The kind for as many dimensions as the layer's input has."""
    if source.dims is not None:
        return kinds[source.dims]
    name = source.form.kind.__name__
    if source.shapes is None:
        raise ValueError(
            f"{name} does not tell how many dimensions its input has; pass example=..., an input "
            "of the model"
        )
    raise Refused(
        f"{name} does not tell how many dimensions its input has, and the example "
        + ("has inputs of several" if source.shapes else "does not call it")
    )


def _several(source: Source) -> int:
    if source.channels < 2:
        raise Refused("its one channel would be normalized by itself")
    return source.channels


def _is_parameter(tensor: Tensor | None) -> TypeGuard[nn.Parameter | None]:
    return tensor is None or isinstance(tensor, nn.Parameter)


def _wide(buffer: Tensor | None) -> Tensor | None:
    """As this library keeps running statistics, in float32 at least."""
    if buffer is None or is_lazy(buffer) or buffer.dtype.itemsize >= 4:
        return buffer
    return buffer.float()


def _narrowed(source: Source, form: Form) -> tuple[Form, torch.dtype | None]:
    """The form with running statistics as narrow as its weight, as torch.nn needs them.

    And the dtype, where they have not been as narrow before.
    """
    weight = form.tensors.get("weight")
    remembered = None if source.origin is None else source.origin.dtypes.get("running_mean")
    dtype = remembered if weight is None else weight.dtype
    wide = {name: b for name in _WIDE if (b := form.buffers.get(name)) is not None}
    if dtype is None or dtype.itemsize >= 4 or all(b.dtype == dtype for b in wide.values()):
        return form, None
    if weight is None and any(b.dtype != torch.float32 for b in wide.values()):
        return form, None  # the model has another dtype since
    narrow = {name: b.to(dtype) for name, b in wide.items()}
    return replace(form, buffers={**form.buffers, **narrow}), dtype if dtype != remembered else None


def _check_thawed(source: Source, name: str) -> None:
    """Raise `Refused` for a layer that keeps to its statistics, which torch.nn's cannot."""
    if source.base is None or source.form.settings.get("_thawed") is not None:
        raise Refused(f"it is frozen, which {name} is by eval() alone; unfreeze() it first")
    statistics = source.form.settings.get("statistics")
    by_birth = source.origin is None or issubclass(source.origin.kind, BatchNorm)
    if isinstance(statistics, (Running, Untracked)) and by_birth:
        raise Refused(f"statistics={statistics} keeps what {name} would move; set Batch() first")

"""Which layers `convert` understands: torch.nn's, this library's, and what others made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from batchnorm.kernels import IDENTITY, Activation
from batchnorm.layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.models.affine import computes
from batchnorm.models.norms import NUMBERS, TorchBatchNorm, is_frozen_norm
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.repair.conversion.form import COMMON, Form, fresh
from batchnorm.repair.freezing.classes import held

__all__ = [
    "ADOPTED",
    "FUSED",
    "LAZY_OURS",
    "LAZY_TORCH",
    "MEMORY",
    "OURS",
    "TORCH",
    "Refused",
    "Source",
    "new",
    "understood",
]

Kinds = dict[int, type[nn.Module]]

TORCH: Kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAZY_TORCH: Kinds = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}
OURS: Kinds = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
LAZY_OURS: Kinds = {1: LazyBatchNorm1d, 2: LazyBatchNorm2d, 3: LazyBatchNorm3d}

_DIMS = {kind: d for kinds in (TORCH, LAZY_TORCH, OURS, LAZY_OURS) for d, kind in kinds.items()}
_KNOWN = {*_DIMS, nn.SyncBatchNorm}

# what a subclass may define and be no other layer for it
_HARMLESS = re.compile(
    r"__(init|repr|module|doc|qualname|annotations|annotate|annotate_func|annotations_cache|"
    r"parameters|firstlineno|static_attributes|orig_bases|type_params|constants)__"
    r"|extra_repr|reset_parameters|_abc_impl|__abstractmethods__"
)

MEMORY = "_converted_from"
FUSED = "_fused_activations"  # the modules whose work it does; and theirs, the norms that do it
ADOPTED = "_adopted_from"  # what `layers.adoption` notes: the class, and the buffers' dtype


class Refused(Exception):  # noqa: N818 - it becomes a reason in the result
    """Why a layer is left as it is."""


@dataclass
class Source:
    """A layer that is understood.

    - `base`: the class of torch.nn or of this library that it is, or that it is derived from.
    - `act`: what it applies after normalizing.
    - `origin`: what it was before it was converted.
    - `shapes`: of its inputs, where an example tells.
    """

    module: nn.Module
    form: Form
    base: type[nn.Module] | None
    act: Activation
    origin: Form | None
    shapes: tuple[torch.Size, ...] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this library's."""
        return self.base is not None and issubclass(self.base, BatchNorm)

    @property
    def is_lazy(self) -> bool:
        """Whether it waits for its first batch."""
        return isinstance(self.module, LazyModuleMixin)

    @property
    def channels(self) -> int:
        """How many there are; raises `Refused` for a lazy layer."""
        self.check_not_lazy()
        return self.form.channels

    def check_not_lazy(self) -> None:
        """Raise `Refused` for a layer that does not know its channels yet."""
        if self.is_lazy:
            raise Refused("it is lazy, and knows no channels before its first batch; run one first")

    @property
    def is_affine(self) -> bool:
        """Whether it has a γ."""
        return self.form.tensors.get("weight") is not None

    @property
    def first_act(self) -> Activation:
        """What it applied before it was converted first."""
        if self.origin is None:
            return self.act
        if "act" in self.origin.modules:  # timm's
            return Activation.of(self.origin.modules["act"])
        act: Activation = self.origin.settings.get("act", IDENTITY)
        return act

    @property
    def dims(self) -> int | None:
        """The dimensions of the positions, where that is known: 2 for images."""
        for form in (self.form, self.origin):
            if form is not None and (base := base_of(form.kind)) in _DIMS:
                return _DIMS[base]
        if self.base is None and (found := re.search(r"([123])[dD]", self.form.kind.__name__)):
            return int(found[1])
        found_dims = {max(len(shape) - 2, 1) for shape in self.shapes or ()}
        return found_dims.pop() if len(found_dims) == 1 else None

    @property
    def positions(self) -> int | None:
        """The fewest positions of a sample, where an example tells."""
        return min((shape[2:].numel() for shape in self.shapes or ()), default=None)

    @property
    def was_trained(self) -> bool:
        """Whether its numbers are other than a new layer's."""
        held = self.form.tensors
        if any(t is not None and (is_lazy(t) or t.is_meta) for t in held.values()):
            return False
        mean, var = held.get("running_mean"), held.get("running_var")
        count = held.get("num_batches_tracked")
        if mean is not None and var is not None:
            moved = bool((mean != 0).any() or (var != 1).any())
            return moved or (count is not None and int(count) > 0)
        weight, bias = held.get("weight"), held.get("bias")
        moved = weight is not None and bool((weight != weight[:1]).any())
        return moved or (bias is not None and bool((bias != 0).any()))


def new(kind: type[nn.Module]) -> Form:
    """The form of a new batch norm of a class."""
    return fresh(kind) if issubclass(kind, LazyModuleMixin) else fresh(kind, 1)


def base_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The first class of torch.nn or of this library that a class is or is derived from."""
    return next((each for each in kind.__mro__ if each in _KNOWN), None)


def understood(module: nn.Module) -> Source:
    """What a batch norm is; raises `Refused` for one that does what `convert` does not know."""
    if is_frozen_norm(module):
        return _frozen(module)
    if "forward" in vars(module):
        raise Refused("it was given a forward of its own")
    if held(module):
        raise Refused("it is frozen; unfreeze(model) first, and freeze it again after")
    base = base_of(type(module))
    if base is None:
        raise Refused(f"{type(module).__name__} is derived from no class of torch.nn's that tells")
    like = new(base)
    form = Form.of(module, like)
    form.settings.update(
        {n: vars(module)[n] for n in (MEMORY, ADOPTED, FUSED) if n in vars(module)}
    )
    act = form.settings.get("act", IDENTITY)
    if type(module).__name__ == "BatchNormAct2d" and base is nn.BatchNorm2d:
        form, act = _with_activation(module, form)
    else:
        own = sorted(_own(type(module), base))
        if own:
            raise Refused(
                f"what {type(module).__name__} does beyond {base.__name__} would be lost: "
                f"{', '.join(own[:4])}"
            )
    return Source(module, form, base, act, _origin(module, form))


def _origin(module: nn.Module, form: Form) -> Form | None:
    """What a layer was before it was converted first; a lazy one has become its class since."""
    if ADOPTED in form.settings:
        kind, dtype = form.settings[ADOPTED]
        dtypes = {} if dtype is None else {"running_mean": dtype, "running_var": dtype}
        return replace(new(kind), dtypes=dtypes)
    origin: Form | None = form.settings.get(MEMORY)
    if origin is None or isinstance(module, LazyModuleMixin):
        return origin
    become = getattr(origin.kind, "cls_to_become", None)
    if become is None:
        return origin
    like = new(become)
    settings = {name: origin.settings.get(name, value) for name, value in like.settings.items()}
    return replace(like, settings=settings)


def _own(kind: type, base: type) -> Iterator[str]:
    """What a class defines beyond the one it is derived from."""
    for each in kind.__mro__:
        if each not in base.__mro__:
            yield from (name for name in vars(each) if not _HARMLESS.fullmatch(name))


def _frozen(module: nn.Module) -> Source:
    """torchvision's FrozenBatchNorm2d: four buffers and eps."""
    name = type(module).__name__
    like = Form(
        nn.Module,
        dict.fromkeys(COMMON),
        buffers=dict.fromkeys((*NUMBERS, "num_batches_tracked")),
    )
    form = Form.of(module, like)
    if not isinstance(form.settings.get("eps"), float):
        raise Refused(f"{name} does not tell its eps; set .eps to what its forward uses")
    form, act = _with_activation(module, form)
    return Source(module, form, None, act, None)


def _with_activation(module: nn.Module, form: Form) -> tuple[Form, Activation]:
    """The form with timm's `drop` and `act`; confirmed by what the layer computes in eval."""
    name, children = type(module).__name__, dict(module._modules)
    drop, last = children.pop("drop", None), children.pop("act", None)
    if children:
        raise Refused(f"{name} holds modules of its own: {', '.join(children)}")
    if drop is not None and type(drop) is not nn.Identity:
        raise Refused(f"{name} drops values before its activation, by {drop}")
    try:
        act = Activation.of(last)
    except ValueError:
        raise Refused(f"{name} ends in {last}, which no layer of this library can fuse") from None
    if not _computes(module, act):
        raise Refused(f"{name} computes something else than a batch norm of its numbers")
    return replace(form, modules=dict(module._modules)), act


def _computes(module: nn.Module, act: Activation) -> bool:
    """Whether a layer computes act(scale·x + shift) in eval mode; a frozen one in training too."""
    mean = module._buffers.get("running_mean")
    if mean is None or mean.is_meta:  # nothing to try it with
        return True
    like = mean.new_zeros(2, len(mean), 2, 2, dtype=_dtype(module, mean))
    modes = (False,) if isinstance(module, TorchBatchNorm) else (False, True)
    with left_as_it_was(module):
        return all(computes(module.train(mode), act, like) for mode in modes)


def _dtype(module: nn.Module, mean: Tensor) -> torch.dtype:
    """What a layer's input is in: its weight's, where it has one."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else mean.dtype

"""Which batch norms are constants at inference, and which modules can take one up, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.layers.base import BatchNorm
from batchnorm.models.affine import Affine, computes
from batchnorm.models.calling import copied
from batchnorm.models.comparison import difference, tolerance
from batchnorm.models.graph import Graph
from batchnorm.models.norms import TorchBatchNorm, has_usual_forward
from batchnorm.models.tracing import is_hooked
from batchnorm.repair.folding.affine import (
    Linear,
    channels_given,
    channels_taken,
    folded_parameters,
)
from batchnorm.repair.folding.change import Change
from batchnorm.repair.folding.folded import FoldedBatchNorm
from batchnorm.repair.folding.trial import Call
from batchnorm.statistics import Running

__all__ = [
    "Norm",
    "Tied",
    "UnfitError",
    "check_linear",
    "has_own_forward",
    "norm_of",
    "uses_batch",
]


class UnfitError(Exception):
    """Why something cannot be folded, as a clause."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm that is a constant, and what is left once that is folded away."""

    path: str
    module: nn.Module
    affine: Affine
    rest: nn.Module

    @property
    def vanishes(self) -> bool:
        """Whether nothing is left, as long as it is given its input alone."""
        return type(self.rest) is nn.Identity or (
            isinstance(self.rest, FoldedBatchNorm) and self.rest.act.name == "identity"
        )


class Tied:
    """The parameters that several modules hold, or that operations take from a module."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._holders: dict[int, set[nn.Module | None]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                self._note(parameter, module)
        for tensor in graph.taken:
            self._note(tensor, None)

    def check(self, module: nn.Module) -> None:
        """Raise `UnfitError` where a module's parameters are not its alone."""
        for name, tensor in module._parameters.items():
            if tensor is not None and len(self._holders.get(tensor.data_ptr(), ())) > 1:
                raise UnfitError(f"its {name} is used elsewhere too")

    def check_taken(self, module: nn.Module) -> None:
        """Raise `UnfitError` where operations themselves compute with what a module holds."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and None in self._holders.get(tensor.data_ptr(), ()):
                raise UnfitError(f"the model computes with its {name} itself")

    def _note(self, tensor: Tensor | None, holder: nn.Module | None) -> None:
        if tensor is not None and tensor.numel():
            self._holders.setdefault(tensor.data_ptr(), set()).add(holder)


def uses_batch(norm: nn.Module) -> bool:
    """Whether a layer depends on the batches it is given, being in training mode."""
    policy = getattr(norm, "statistics", None)
    is_frozen = isinstance(policy, Running) and not policy.updates
    return isinstance(norm, TorchBatchNorm) and norm.training and not is_frozen


def has_own_forward(module: nn.Module) -> bool:
    """Whether it computes in a way of its own, and not as the class whose name it bears."""
    kind = type(module)
    if "forward" in vars(module):
        return True
    if isinstance(module, TorchBatchNorm):
        return not has_usual_forward(module)
    convolves = getattr(kind, "_conv_forward", _CONVS[0])
    return kind.forward not in _LINEARS or convolves not in _CONVS


_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEARS = tuple(kind.forward for kind in (*_LINEAR, *_TRANSPOSED))
_CONVS = tuple(kind._conv_forward for kind in (nn.modules.conv._ConvNd, *_LINEAR[:3]))


def norm_of(path: str, module: nn.Module, calls: Mapping[nn.Module, Call]) -> Norm:
    """A batch norm as the constant that it is; `calls`: of those with a forward of their own.

    Raises `UnfitError` for one that is none.
    """
    if (
        getattr(module, "running_mean", None) is None
        or getattr(module, "running_var", None) is None
    ):
        raise UnfitError("it keeps no running statistics and normalizes with the batch")
    if uses_batch(module):
        raise UnfitError("in training mode it normalizes with the batch; call its eval()")
    if not path:
        raise UnfitError("it is the model itself; put it into a torch.nn.Sequential")
    if is_hooked(module):
        raise UnfitError("it has hooks, which would not be called any more")
    if not isinstance(getattr(module, "eps", None), float):
        raise UnfitError("it does not tell its eps; set .eps to what its forward uses")
    affine = Affine.of(module)
    if not (affine.is_finite and all(bool(t.isfinite().all()) for t in module.buffers(False))):
        raise UnfitError("its statistics or parameters are not finite, or var + ε is not > 0")
    rest = _rest(module, affine)
    call = calls.get(module)
    if call is not None and not _computes(module, call, rest):
        raise UnfitError("its own forward computes something else")
    return Norm(path, module, affine, rest)


def _rest(norm: nn.Module, affine: Affine) -> nn.Module:
    """What a layer does besides: this library's act(x + residual), others' their submodules."""
    rest: nn.Module
    if isinstance(norm, BatchNorm) and not has_own_forward(norm):
        rest = FoldedBatchNorm(affine.channels, norm.act)
    elif any(norm.children()):  # such as timm's dropout and activation
        rest = nn.Sequential(*norm.children())
    else:
        rest = nn.Identity()
    rest.training = norm.training  # not train(), which would reach the submodules
    return rest


def _computes(norm: nn.Module, call: Call, rest: nn.Module) -> bool:
    """Whether a norm with a forward of its own computes rest(scale·x + shift)."""
    alone = isinstance(call.input, Tensor) and len(call.args) + len(call.kwargs) == 1
    return alone and computes(norm, rest, call.input)


def check_linear(module: Linear, tied: Tied, call: Call | None) -> None:
    """Raise `UnfitError` for a module whose weight is not to be scaled.

    - `call`: one of its calls, where it has a forward of its own.
    """
    for name in ("weight", "bias"):
        if name not in module._parameters:
            raise UnfitError(f"its {name} is computed, and no parameter of its own")
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in _DTYPES:
        raise UnfitError(f"its weight is {type(module.weight).__name__}, {module.weight.dtype}")
    if is_hooked(module):
        raise UnfitError("it has hooks, which would be given something else")
    tied.check(module)
    if has_own_forward(module) and (call is None or not _is_linear_in_its_weight(module, call)):
        raise UnfitError("it computes with its weight in another way")


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_linear_in_its_weight(module: Linear, call: Call) -> bool:
    """Whether scaling the weight and moving the bias of a module does that to its output."""
    if not isinstance(call.output, Tensor):
        return False
    channels, dim = channels_given(module), 1 - module.weight.ndim
    size = float(call.output.abs().max())
    scale = torch.linspace(0.5, 2, channels, dtype=torch.float64)
    asked = Affine(scale, torch.linspace(-size, size, channels, dtype=torch.float64))
    change = Change()
    taken = Affine.identity(channels_taken(module))
    for name, new in zip(("weight", "bias"), folded_parameters(module, taken, asked), strict=True):
        change.set_parameter(module, name, new)
    try:
        with change.made():
            output = module(*copied(call.args), **copied(call.kwargs))
        expected = asked(call.output, dim)
    except Exception:  # a forward of its own may do anything
        return False
    return difference([output], [expected]) <= tolerance([call.output])

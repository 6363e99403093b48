"""The activations that a batch norm can end in, each with its derivative.

Only the pre-activation z is needed to differentiate; no kernel stores a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "IDENTITY", "Activation"]

aten = torch.ops.aten


class _Function(NamedTuple):
    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]  # (dy, z, parameter) -> dy · act'(z)
    parameter: float = 0.0  # the default of the one number some activations take


def _sigmoid_backward(dy: Tensor, z: Tensor, _: float) -> Tensor:
    dz: Tensor = aten.sigmoid_backward(dy, torch.sigmoid(z))
    return dz


def _tanh_backward(dy: Tensor, z: Tensor, _: float) -> Tensor:
    dz: Tensor = aten.tanh_backward(dy, torch.tanh(z))
    return dz


ACTIVATIONS: dict[str, _Function] = {
    "identity": _Function(lambda z, _: z, lambda dy, z, _: dy),
    "relu": _Function(lambda z, _: F.relu(z), lambda dy, z, _: aten.threshold_backward(dy, z, 0)),
    "leaky_relu": _Function(  # parameter: the negative slope
        lambda z, slope: F.leaky_relu(z, slope),
        lambda dy, z, slope: aten.leaky_relu_backward(dy, z, slope, False),
        0.01,
    ),
    "elu": _Function(  # parameter: α
        lambda z, alpha: F.elu(z, alpha),
        lambda dy, z, alpha: aten.elu_backward(dy, alpha, 1, 1, False, z),
        1.0,
    ),
    "silu": _Function(lambda z, _: F.silu(z), lambda dy, z, _: aten.silu_backward(dy, z)),
    "gelu": _Function(lambda z, _: F.gelu(z), lambda dy, z, _: aten.gelu_backward(dy, z)),
    "gelu_tanh": _Function(
        lambda z, _: F.gelu(z, approximate="tanh"),
        lambda dy, z, _: aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "hardswish": _Function(
        lambda z, _: F.hardswish(z), lambda dy, z, _: aten.hardswish_backward(dy, z)
    ),
    "sigmoid": _Function(lambda z, _: torch.sigmoid(z), _sigmoid_backward),
    "tanh": _Function(lambda z, _: torch.tanh(z), _tanh_backward),
}


@dataclass(frozen=True)
class Activation:
    """One of `ACTIVATIONS` by name, with its parameter where it has one.

    ```python
    Activation.of("relu")
    Activation.of(torch.nn.LeakyReLU(0.2))      # Activation("leaky_relu", 0.2)
    Activation.of(None)                         # the identity
    ```
    """

    name: str
    parameter: float = 0.0

    @classmethod
    def of(cls, act: str | nn.Module | Activation | None) -> Activation:
        """Read an activation as users write one: a name, a `torch.nn` module, or None.

        Raises `ValueError` for a name or a module that is not among `ACTIVATIONS`.
        """
        if isinstance(act, cls):
            return act
        if act is None:
            return IDENTITY
        if isinstance(act, str) and act in ACTIVATIONS:
            return cls(act, ACTIVATIONS[act].parameter)
        # exact types: a subclass may compute something else
        if type(act) is nn.LeakyReLU:
            return cls("leaky_relu", act.negative_slope)
        if type(act) is nn.ELU:
            return cls("elu", act.alpha)
        if type(act) is nn.GELU:
            return cls("gelu_tanh" if act.approximate == "tanh" else "gelu")
        if type(act) in _MODULES:
            return cls(_MODULES[type(act)])
        raise ValueError(
            f"act must be one of {', '.join(ACTIVATIONS)}, a torch.nn module of these, or None; "
            f"got {act!r}; apply other activations after the layer"
        )

    def __call__(self, z: Tensor) -> Tensor:
        """act(z), elementwise."""
        return ACTIVATIONS[self.name].forward(z, self.parameter)

    def backward(self, dy: Tensor, z: Tensor) -> Tensor:
        """dy · act'(z), elementwise; differentiable again where gradients are on."""
        if torch.is_grad_enabled():
            # some of PyTorch's backward operations have no derivative of their own
            z = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad(self(z), z, dy, create_graph=True)[0]
        return ACTIVATIONS[self.name].backward(dy, z, self.parameter)

    def __str__(self) -> str:
        default = ACTIVATIONS[self.name].parameter
        return self.name if self.parameter == default else f"{self.name}({self.parameter:g})"


IDENTITY = Activation("identity")

_MODULES: dict[type, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}

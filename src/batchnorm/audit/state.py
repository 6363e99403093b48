"""What a checkpoint or a model holds of its batch norm layers, as the rules see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.norms import TorchBatchNorm

__all__ = ["LayerState", "State", "state_of"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """One batch norm layer at `path`; None for what is not there or not told.

    - `eps`: a state dict does not tell it.
    - `module`: the layer itself, where there is a model.
    """

    path: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None
    eps: float | None = None
    module: TorchBatchNorm | None = None

    @property
    def is_initial(self) -> bool:
        """Whether the running statistics are exactly those that a new layer begins with."""
        mean, var = self.running_mean, self.running_var
        return mean is not None and var is not None and bool((mean == 0).all() & (var == 1).all())

    @property
    def has_learned(self) -> bool:
        """Whether β differs between channels, which no initialization makes it; else γ.

        γ alone is drawn at random by some, N(1, 0.02) as in DCGAN.
        """
        affine = self.weight if self.bias is None else self.bias
        return affine is not None and affine.numel() > 1 and bool((affine != affine[0]).any())


@dataclass(frozen=True, eq=False)
class State:
    """The layers of a checkpoint, or of a model, under the name that the user gave."""

    name: str
    layers: tuple[LayerState, ...] = field(default_factory=tuple)


def state_of(model: nn.Module, name: str) -> State:
    """The state of every batch norm layer of a model; lazy layers have no tensors yet."""
    layers = (
        _layer(path or type(module).__name__, module)
        for path, module in model.named_modules()
        if isinstance(module, TorchBatchNorm)
    )
    return State(name, tuple(layers))


def _layer(path: str, module: TorchBatchNorm) -> LayerState:
    return LayerState(
        path,
        weight=_born(module.weight),
        bias=_born(module.bias),
        running_mean=_born(module.running_mean),
        running_var=_born(module.running_var),
        batches=module.num_batches_tracked,
        eps=module.eps,
        module=module,
    )


def _born(tensor: Tensor | None) -> Tensor | None:
    """None for a tensor that has no values yet: of a lazy layer, or on the meta device."""
    if tensor is None or is_lazy(tensor) or tensor.is_meta:
        return None
    return tensor.detach()

"""The normalizations that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, Renorm

__all__ = ["Norm", "Sequence", "norm_of"]

Norm = Callable[[int], nn.Module]
"""Makes the layer for so many channels."""

_GROUP = 4  # channels
_SLICE = 16  # samples of ghost batch norm


class Sequence(nn.Module):
    """A norm of (n, channels, length), for a network whose channels come last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Float[Tensor, "n length channels"]) -> Float[Tensor, "n length channels"]:
        """Normalize each channel over samples and positions."""
        out: Tensor = self.norm(x.transpose(1, 2))
        return out.transpose(1, 2)


def norm_of(kind: str, *, of: str = "images") -> Norm | None:
    """What makes the layers of a kind; None for "none".

    Args:
        kind: "none", "batch", "ghost" (slices of 16 samples), "renorm", "instance", "group" (of 4
            channels) or "layer" (for images over channels and positions: group norm of one group).
        of: "images" (n, c, h, w), "features" (n, c), or "sequences" (n, length, c).

    Raises:
        ValueError: Another kind.
    """
    if kind == "none":
        return None
    if kind == "layer" and of != "images":
        return nn.LayerNorm
    batch = BatchNorm2d if of == "images" else BatchNorm1d
    kinds: dict[str, Norm] = {
        "batch": batch,
        "ghost": partial(batch, statistics=Ghost(_SLICE)),
        "renorm": partial(batch, statistics=Renorm()),
        "instance": partial(nn.InstanceNorm2d, affine=True),
        "group": lambda channels: nn.GroupNorm(max(1, channels // _GROUP), channels),
        "layer": lambda channels: nn.GroupNorm(1, channels),
    }
    if kind not in kinds:
        raise ValueError(f"a norm is none, {', '.join(kinds)}; got {kind!r}")
    made = kinds[kind]
    return made if of != "sequences" else lambda channels: Sequence(made(channels))

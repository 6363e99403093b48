"""A multilayer perceptron."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.lab.networks.norms import Norm

__all__ = ["Perceptron"]


class Perceptron(nn.Module):
    """Linear layers, each with norm and ReLU, and one for the logits.

    Args:
        norm: Makes the norm of so many channels; without one the linear layers have biases.
        inputs: Features of a sample; images are flattened.
        depth: Hidden layers.
        width: Units of each.
        gain: What He et al.'s initial weights are multiplied with.
        outputs: Logits, or numbers of a regression.
    """

    def __init__(
        self,
        norm: Norm | None,
        *,
        inputs: int,
        depth: int = 3,
        width: int = 64,
        gain: float = 1.0,
        outputs: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(depth):
            linear = nn.Linear(width if i else inputs, width, bias=norm is None)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            linear.weight.data.mul_(gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            layers += [linear, *([] if norm is None else [norm(width)]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "n *features"]) -> Float[Tensor, "n outputs"]:
        """Logits."""
        out: Tensor = self.head(self.features(x))
        return out

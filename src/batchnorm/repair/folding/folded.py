"""What is left of a batch norm layer of this library once its normalization is folded away."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from batchnorm.kernels import Activation

__all__ = ["FoldedBatchNorm"]


class FoldedBatchNorm(nn.Module):
    """A layer whose normalization is done by the convolution before it: act(x + residual).

    ```python
    FoldedBatchNorm(64, "relu")(x, residual=skip)       # as the layer was called, (n, 64, h, w)
    ```

    - `num_features`: channels, c.
    - `act`: the activation that was fused into the layer.
    """

    def __init__(self, num_features: int, act: str | nn.Module | Activation | None = None) -> None:
        super().__init__()
        self.num_features, self.act = num_features, Activation.of(act)

    def forward(
        self,
        input: Float[Tensor, "n c *positions"],
        *,
        residual: Float[Tensor, "n c *positions"] | None = None,
        mask: Bool[Tensor, "n *positions"] | None = None,
    ) -> Float[Tensor, "n c *positions"]:
        """Add `residual`, apply the activation, and leave zeros where `mask` is false."""
        y = self.act(input if residual is None else input + residual)
        return y if mask is None else y.where(mask.unsqueeze(1), 0)

    def extra_repr(self) -> str:
        """Channels and activation."""
        return f"{self.num_features}, act={self.act}"

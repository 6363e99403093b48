"""PyTorch's LayerNorm and RMSNorm over the channels of (n, c, *positions)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ChannelLayerNorm", "ChannelRMSNorm"]


class ChannelLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over dimension 1: each position of each sample by its own channels.

    ```python
    ChannelLayerNorm(64)(x)                     # (n, 64, *positions)
    ```

    Source: Liu et al. 2022, "A ConvNet for the 2020s", section 2.5, which puts it in place of
    batch norm. One mean and variance for all channels and positions of a sample, as Ba et al.
    2016 have for convolutions, is `torch.nn.GroupNorm(1, 64)`.
    """

    def forward(self, input: Float[Tensor, "n c *positions"]) -> Float[Tensor, "n c *positions"]:
        """Normalize each position of `input` over its channels."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ChannelRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over dimension 1: each position of each sample by its own channels.

    ```python
    ChannelRMSNorm(64, eps=1e-5)(x)             # (n, 64, *positions)
    ```

    Source: Zhang & Sennrich 2019, "Root mean square layer normalization", equation 4.
    """

    def forward(self, input: Float[Tensor, "n c *positions"]) -> Float[Tensor, "n c *positions"]:
        """Normalize each position of `input` over its channels."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)

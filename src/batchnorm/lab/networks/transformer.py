"""A small autoregressive transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from batchnorm.lab.networks.norms import Norm

__all__ = ["Transformer"]


class _Block(nn.Module):
    """Attention to what came before, then two linear layers, each behind a norm."""

    def __init__(self, norm: Norm | None, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.Identity() if norm is None else norm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.norm2 = nn.Identity() if norm is None else norm(width)
        self.inner = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.queries_keys_values(self.norm1(x)).chunk(3, -1)
        q, k, v = (p.view(n, length, self.heads, -1).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).reshape(n, length, width))
        out: Tensor = x + self.inner(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Predicts each next symbol of a sequence from those before it.

    Args:
        norm: Makes the norm of so many channels of (n, length, channels), or None.
        symbols: Of the alphabet.
        length: The longest sequence.
        width: Channels.
        depth: Blocks.
        heads: Of the attention.

    Source: Vaswani et al. 2017, section 3; norms before each part, as Xiong et al. 2020.
    """

    def __init__(
        self,
        norm: Norm | None,
        *,
        symbols: int,
        length: int = 32,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Block(norm, width, heads) for _ in range(depth)))
        self.norm = nn.Identity() if norm is None else norm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Int[Tensor, "n length"]) -> Float[Tensor, "n length symbols"]:
        """Logits of the next symbol at each place."""
        inner = self.symbols(x) + self.places[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(inner)))
        return logits

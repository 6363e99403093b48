"""Convolutional networks, plain and residual, of any depth."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.lab.networks.norms import Norm

__all__ = ["PlainNetwork", "ResidualNetwork"]


def _convolution(c_in: int, c: int, stride: int, *, bias: bool, gain: float) -> nn.Conv2d:
    """3×3, He et al.'s initialization times `gain`."""
    conv = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    conv.weight.data.mul_(gain)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class PlainNetwork(nn.Module):
    """Convolutions of 3×3 one after the other, each with norm and ReLU; average, linear.

    Args:
        norm: Makes the norm of so many channels; without one the convolutions have biases.
        depth: How many convolutions. Those at a third and two thirds of the way halve the image.
        width: Channels.
        gain: What He et al.'s initial weights are multiplied with.
        classes: Logits.
    """

    def __init__(
        self,
        norm: Norm | None,
        *,
        depth: int,
        width: int = 16,
        gain: float = 1.0,
        classes: int = 10,
    ) -> None:
        super().__init__()
        halving = {depth // 3, 2 * depth // 3} - {0}
        layers: list[nn.Module] = []
        for i in range(depth):
            c_in, stride = (width if i else 1), (2 if i in halving else 1)
            layers.append(_convolution(c_in, width, stride, bias=norm is None, gain=gain))
            if norm is not None:
                layers.append(norm(width))
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, norm: Norm | None, c_in: int, c: int, stride: int, gain: float) -> None:
        super().__init__()
        bias = norm is None
        self.conv1 = _convolution(c_in, c, stride, bias=bias, gain=gain)
        self.norm1 = nn.Identity() if norm is None else norm(c)
        self.conv2 = _convolution(c, c, 1, bias=bias, gain=gain)
        self.norm2 = nn.Identity() if norm is None else norm(c)
        is_same = stride == 1 and c_in == c
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(c_in, c, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.norm1(self.conv1(x)))
        out: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return out


class ResidualNetwork(nn.Module):
    """A stem, blocks of two convolutions beside a shortcut, average, linear.

    Args:
        norm: Makes the norm of so many channels; without one the convolutions have biases.
        blocks: How many; those at a third and two thirds of the way halve the image and have
            twice the channels.
        width: Channels of the stem.
        gain: What He et al.'s initial weights are multiplied with.
        classes: Logits.

    Source: He, Zhang, Ren & Sun 2016, "Deep residual learning", section 3.
    """

    def __init__(
        self,
        norm: Norm | None,
        *,
        blocks: int = 3,
        width: int = 8,
        gain: float = 1.0,
        classes: int = 10,
    ) -> None:
        super().__init__()
        stem = _convolution(1, width, 1, bias=norm is None, gain=gain)
        self.stem = nn.Sequential(stem, nn.Identity() if norm is None else norm(width), nn.ReLU())
        halving = {blocks // 3, 2 * blocks // 3} - {0}
        made: list[nn.Module] = []
        channels = width
        for i in range(blocks):
            c = channels * 2 if i in halving else channels
            made.append(_Block(norm, channels, c, 2 if i in halving else 1, gain))
            channels = c
        self.blocks = nn.Sequential(*made)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits

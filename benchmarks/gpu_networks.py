"""The networks of `gpu_step.py`: one network in each variant, and a training step of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels import Activation

EAGER, COMPILED = "torch eager", "torch.compile"
OURS, ADDED = "ours", "ours, additions fused"
REMATERIALIZED = "ours, rematerialized"
ADDED_REMATERIALIZED = "ours, additions fused, rematerialized"
VARIANTS = (EAGER, COMPILED, OURS, ADDED, REMATERIALIZED, ADDED_REMATERIALIZED)


def network(name: str) -> nn.Module:
    """pytorchcv's of this name, or what `package.module:function` returns, with known weights."""
    torch.manual_seed(0)
    if ":" in name:
        module, function = name.split(":")
        made = getattr(importlib.import_module(module), function)()
    else:
        from pytorchcv.model_provider import get_model

        made = get_model(name)
    return made.train()


def tiny() -> nn.Module:
    """Two of pytorchcv's residual units, for a dry run."""
    from pytorchcv.models.common import conv3x3_block
    from pytorchcv.models.resnet import ResUnit

    body = [conv3x3_block(3, 8), ResUnit(8, 16, stride=2), ResUnit(16, 16, stride=1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def varied(model: nn.Module, variant: str) -> nn.Module:
    """A model of torch.nn's layers as a variant has it.

    "ours" is what a call of `convert` gives, which takes over activations, where they are modules.
    An addition is an operation of the network's own code: to give it to the layer its author edits
    that code, as `fuse_additions` does.
    """
    if variant == EAGER:
        return model
    if variant == COMPILED:
        return torch.compile(model)
    batchnorm.convert(model, to="batchnorm", fuse=True)
    if variant in (ADDED, ADDED_REMATERIALIZED):
        fuse_additions(model)
    if variant in (REMATERIALIZED, ADDED_REMATERIALIZED):
        batchnorm.rematerialize(model)
    return model


def fuse_additions(model: nn.Module) -> None:
    """Have the last norm of each of pytorchcv's residual units add the shortcut, and act."""
    from pytorchcv.models.resnet import ResUnit

    class FusedUnit(ResUnit):
        def forward(self, x: Tensor) -> Tensor:
            identity = self.identity_conv(x) if self.resize_identity else x
            *first, last = self.body.children()
            for block in first:
                x = block(x)
            return last.bn(last.conv(x), residual=identity)

    units = [module for module in model.modules() if type(module) is ResUnit]
    if not units:
        raise ValueError("additions are fused by hand, and here only in pytorchcv's ResNets")
    for unit in units:
        *_, last = unit.body.children()
        last.bn.act = Activation.of("relu")
        unit.__class__ = FusedUnit


Batch = tuple[Tensor, Tensor]  # images, labels


def random_batch(size: int, image: int, classes: int, device: torch.device) -> Batch:
    images = torch.randn(size, 3, image, image, device=device)
    labels = torch.randint(classes, (size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


class Training:
    """A variant of a network and its optimizer: SGD with momentum, in bf16 by autocast."""

    def __init__(self, name: str, variant: str, device: torch.device) -> None:
        plain = network(name).to(device, memory_format=torch.channels_last)
        self.device, self.model = device, varied(plain, variant)
        self.optimizer = torch.optim.SGD(
            plain.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4
        )

    def loss(self, batch: Batch) -> Tensor:
        images, labels = batch
        with torch.autocast(self.device.type, torch.bfloat16):
            return nn.functional.cross_entropy(self.model(images), labels)

    def step(self, batch: Batch) -> Iterator[None]:
        """Forward, backward and optimizer, with a `yield` behind each."""
        loss = self.loss(batch)
        yield
        loss.backward()
        yield
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield

    def steps(self, batches: list[Batch]) -> None:
        for batch in batches:
            for _ in self.step(batch):
                pass


def gradients(
    name: str, variant: str, batch: Batch, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Loss and all gradients of a step without autocast and tf32, as one float64 tensor."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = network(name).to(device, dtype, memory_format=torch.channels_last)
        model = varied(plain, variant)
        images, labels = batch
        loss = nn.functional.cross_entropy(model(images.to(dtype)), labels)
        loss.backward()
    parts = [loss.detach().reshape(1), *(p.grad.flatten() for p in plain.parameters())]
    return torch.cat([part.double() for part in parts])


def largest_that_fits(
    fits: Callable[[int], bool], start: int, step: int, most_trials: int
) -> tuple[int, int]:
    """The largest multiple of `step` that fits, by doubling or halving and bisection.

    Returns it, 0 where none fits, and the smallest that was seen not to; with too few trials they
    are further apart than a step. `start` is a multiple of `step`.
    """
    low, high, size = 0, None, start
    for _ in range(most_trials):
        if fits(size):
            low = size
        else:
            high = size
        if high is not None and high - low <= step:
            break
        size = 2 * low if high is None else (low + high) // 2 // step * step
    return low, high or 2 * low

"""Networks to recalibrate, and what entered their layers, in float64 NumPy."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from batchnorm import BatchNorm2d

UPSTREAMS = ["batch", "running"]


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def plain(norm=nn.BatchNorm2d, **options):
    """Three layers deep, registered in another order than they are called."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.norm3 = nn.Linear(6, 2), norm(6, **options)
            self.conv1, self.norm1 = conv(3, 4), norm(4, **options)
            self.conv2, self.norm2 = conv(4, 5), norm(5, **options)
            self.conv3, self.drop = conv(5, 6), nn.Dropout(0.5)

        def forward(self, x):
            x = self.drop(self.norm1(self.conv1(x)).relu())
            x = self.norm2(self.conv2(x)).relu()
            return self.last(self.norm3(self.conv3(x)).relu().mean((2, 3)))

    return Net()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = conv(4, 4), BatchNorm2d(4, act="relu")
        self.conv2, self.norm2 = conv(4, 4), BatchNorm2d(4, act="relu")
        self.shortcut = nn.Sequential(conv(4, 4), nn.SyncBatchNorm(4))

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.shortcut(x))


def residual():
    return nn.Sequential(conv(3, 4), BatchNorm2d(4, act="relu"), Block())


def images(*sizes, spread=1.0):
    """Batches whose means lie apart."""
    return [torch.randn(n, 3, 6, 6) * (1 + i) + spread * i for i, n in enumerate(sizes)]


def pooled(inputs):
    """The mean and the unbiased variance of all that entered a layer, in NumPy's float64."""
    rows = np.concatenate([x.double().movedim(1, 0).flatten(1).numpy() for x in inputs], 1)
    return rows.mean(1), rows.var(1, ddof=1)


@torch.no_grad()
def entering(model, batches):
    """What enters each batch norm layer at inference."""
    model, inputs = copy.deepcopy(model).eval(), {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            inputs[path] = []
            layer.register_forward_pre_hook(lambda _, a, into=inputs[path]: into.append(a[0]))
    for batch in batches:
        model(batch)
    return inputs


def far_off(model, batches):
    """By how many standard deviations a running mean or variance is off what enters at most."""
    furthest = 0.0
    for path, inputs in entering(model, batches).items():
        (mean, var), layer = pooled(inputs), model.get_submodule(path)
        furthest = max(
            furthest,
            np.abs((layer.running_mean.numpy() - mean) / np.sqrt(var)).max(),
            np.abs(layer.running_var.numpy() / var - 1).max(),
        )
    return furthest


def state(model):
    """Everything that recalibration could leave behind, to be compared with ==."""
    return [
        (
            path,
            type(module),
            module.training,
            {k: v for k, v in vars(module).items() if isinstance(v, (int, float, type(None)))},
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            {
                k: (id(p), p.requires_grad, p.grad)
                for k, p in module._parameters.items()
                if p is not None
            },
            {k: id(b) for k, b in module._buffers.items()},
        )
        for path, module in model.named_modules()
    ]


def values(model, but=()):
    return {k: v.tolist() for k, v in model.state_dict().items() if not k.endswith(tuple(but))}


STATISTICS = ("running_mean", "running_var")


def interrupted(function, after):
    """Some calls of a function, then Ctrl-C."""
    left = [after]

    def call(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)

    return call


def broken(batches, error):
    yield from batches
    raise error


class Breaks(nn.Module):
    """Passes its input on, some times."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.left = error, [after]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise self.error
        return x

"""A Keras network with weights as trained ones are, what it answers, and what a batch leaves."""

from __future__ import annotations

import sys

import keras
import numpy as np
import torch
from keras import layers

from batchnorm.repair.porting import port

random = np.random.default_rng(0)


def network():
    return keras.Sequential(
        [
            layers.Input((9, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="mixing"),
            layers.BatchNormalization(scale=False, center=False, epsilon=1e-2, momentum=0.9),
            layers.SeparableConv2D(6, 2),
            layers.BatchNormalization(scale=False, name="shifted"),
            layers.Conv2DTranspose(2, 3, strides=2, name="up"),
            layers.Flatten(),
            layers.BatchNormalization(name="flat"),
            layers.Dense(5),
            layers.BatchNormalization(center=False),
            layers.Dropout(0.5),
            layers.LayerNormalization(epsilon=1e-5),
        ],
        name="net",
    )


SINGLE = {  # one layer each, before a batch norm
    "Conv1d": (layers.Conv1D(4, 3), (7, 3)),
    "Conv3d": (layers.Conv3D(4, 2), (4, 3, 5, 2)),
    "grouped": (layers.Conv2D(6, 3, groups=2), (5, 4, 4)),
    "depthwise 1d": (layers.DepthwiseConv1D(3, depth_multiplier=2), (7, 3)),
    "transposed 1d": (layers.Conv1DTranspose(4, 3, strides=2), (5, 3)),
    "transposed 3d": (layers.Conv3DTranspose(2, 2, strides=2), (2, 3, 2, 3)),
}


def trained(model):
    """Weights and statistics as training leaves them: all of them different."""
    for v in model.variables:
        if not np.issubdtype(v.numpy().dtype, np.floating):
            continue
        positive = v.path.endswith(("gamma", "moving_variance"))
        v.assign(random.uniform(0.5, 2, v.shape) if positive else random.normal(0, 0.5, v.shape))
    return model


def values(model):
    return {v.path: v.numpy() for v in model.variables}


def answers(model, x, **options):
    return model(x, **options).detach().numpy()


saved = {}
model = trained(network())
x = random.normal(size=(8, 9, 8, 3)).astype("float32")
saved["x"], saved["weights"], saved["y"] = x, values(model), answers(model, x)
norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
saved["eps"] = {layer.path: layer.epsilon for layer in norms}
saved["momentum"] = {layer.path: layer.momentum for layer in norms}
# as they are, and not as arrays
saved["ported"] = dict(port({v.path: v for v in model.variables}, "keras").state_dict)
answers(model, x, training=True)
saved["after"] = values(model)
for name, (layer, shape) in SINGLE.items():
    model = trained(keras.Sequential([layers.Input(shape), layer, layers.BatchNormalization()]))
    x = random.normal(size=(2, *shape)).astype("float32")
    saved[name] = {"x": x, "weights": values(model), "y": answers(model, x)}

torch.save(saved, sys.argv[1])

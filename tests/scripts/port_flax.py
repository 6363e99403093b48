"""Flax networks with weights as trained ones are, what they answer, and what a batch leaves."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict

from batchnorm.repair.porting import port

random = np.random.default_rng(0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), feature_group_count=4, padding="VALID")(x)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-2, use_scale=False, use_bias=False)(
            x
        )


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, padding="VALID")(x)
        x = nn.relu(nn.BatchNorm(not train)(x))
        x = Block()(x, train)
        x = nn.ConvTranspose(3, (3, 2), strides=(2, 2), padding="VALID")(x)
        x = nn.BatchNorm(not train, use_scale=False)(x)
        x = nn.Dense(5)(x.reshape(len(x), -1))
        return nn.LayerNorm(epsilon=1e-5)(nn.BatchNorm(not train, name="last")(x))


class Single(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, name="norm")(self.layer(x))


SINGLE = {  # one layer each, before a batch norm
    "Conv1d": (nn.Conv(4, (3,), padding="VALID"), (7, 3)),
    "Conv3d": (nn.Conv(4, (2, 2, 2), padding="VALID"), (4, 3, 5, 2)),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=3, padding="VALID"), (5, 4, 3)),
    "transposed 1d": (nn.ConvTranspose(4, (3,), (2,), padding="VALID"), (5, 3)),
}


class Modern(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norms = nnx.Sequential(nnx.BatchNorm(4, rngs=rngs))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norms(self.conv(x)).mean((1, 2))))


def trained(path, value):
    """Weights and statistics as training leaves them: all of them different."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    positive = str(getattr(path[-1], "key", path[-1])) in ("scale", "var")
    drawn = random.uniform(0.5, 2, value.shape) if positive else random.normal(0, 0.5, value.shape)
    return jnp.asarray(drawn, value.dtype)


def made(network, x):
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(trained, variables)


def arrays(variables):
    return jax.tree.map(np.array, variables)


def answers(network, variables, x):
    return np.array(jax.jit(network.apply)(variables, x))


def ported(variables):
    return dict(port(variables, "flax").state_dict)


saved = {}
x = random.normal(size=(8, 9, 8, 3)).astype("float32")
variables = made(Network(), x)
saved["x"], saved["weights"] = x, arrays(variables)
saved["y"] = answers(Network(), variables, x)
learn = jax.jit(lambda v, x: Network().apply(v, x, train=True, mutable=["batch_stats"])[1])
saved["after"] = arrays(learn(variables, x))
# the same in all forms, with JAX's arrays
saved["ported"] = [
    ported(variables),
    ported(freeze(variables)),
    ported(flatten_dict(variables)),
    ported(flatten_dict(variables, sep="/")),
]
saved["bfloat16"] = ported(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables))
for name, (layer, shape) in SINGLE.items():
    x = random.normal(size=(2, *shape)).astype("float32")
    variables = made(Single(layer), x)
    y = answers(Single(layer), variables, x)
    saved[name] = {"x": x, "weights": arrays(variables), "y": y}

model = Modern(nnx.Rngs(0))
state = nnx.to_pure_dict(nnx.state(model))
for name in ("conv", "norms", "head"):
    state[name] = jax.tree_util.tree_map_with_path(trained, state[name])
nnx.update(model, state)
model.eval()
x = random.normal(size=(8, 5, 6, 3)).astype("float32")
saved["nnx"] = {
    "x": x,
    "y": np.array(nnx.jit(model)(x)),
    "ported": [ported(state), ported(nnx.state(model))],
}

torch.save(saved, sys.argv[1])

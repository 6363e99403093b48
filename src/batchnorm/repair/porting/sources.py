"""What frameworks call the tensors of a batch norm, and what they mean by momentum and ε."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["FLAX", "KERAS", "SOURCES", "TORCH", "Framework", "Source"]

Framework: TypeAlias = Literal["keras", "flax", "torch"]


@dataclass(frozen=True)
class Source:
    """The conventions of a framework.

    - `title`: its name.
    - `names`: what it calls a tensor of a layer, and what torch.nn does.
    - `eps`, `momentum`: the defaults of its batch norm, in its own sense.
    - `separators`: what stands between the segments of a name.
    - `keeps`: whether its momentum is the share of the old value; torch.nn's is of the new one.
    - `is_biased`: whether its running variance follows the biased variances of the batches.
    - `stateful`: segments of names whose values are no weights.
    - `everything`: how to hand in all there is to port.
    """

    title: str
    names: Mapping[str, str]
    eps: float
    momentum: float
    separators: str
    everything: str
    keeps: bool = True
    is_biased: bool = True
    stateful: frozenset[str] = field(default_factory=frozenset)

    def torch_momentum(self, momentum: float) -> float:
        """The same momentum in PyTorch's sense, the share of the new value."""
        return round(1 - momentum, 15) if self.keeps else momentum  # 1 − 0.99 is 0.01, to read


KERAS = Source(
    "Keras",
    {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
        "bias": "bias",
        "embeddings": "weight",
    },
    eps=1e-3,
    momentum=0.99,
    separators="/.",
    everything="{v.path: v.numpy() for v in model.variables}",
    stateful=frozenset({"seed_generator_state", "moving_stddev", "renorm_mean", "renorm_stddev"}),
)

FLAX = Source(
    "Flax",
    {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "embedding": "weight",
    },
    eps=1e-5,
    momentum=0.99,
    separators="/.",
    everything='{"params": …, "batch_stats": …}, or nnx.to_pure_dict(nnx.state(model))',
    stateful=frozenset({"rngs"}),
)

TORCH = Source(
    "PyTorch",
    {
        name: name
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
    eps=1e-5,
    momentum=0.1,
    separators=".",
    everything="model.state_dict()",
    keeps=False,
    is_biased=False,
    stateful=frozenset({"n_averaged"}),  # of torch.optim.swa_utils.AveragedModel
)

SOURCES: dict[Framework, Source] = {"keras": KERAS, "flax": FLAX, "torch": TORCH}
"""The frameworks that are understood."""

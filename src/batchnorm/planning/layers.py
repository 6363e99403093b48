"""The layers that would be synchronized, and how noisy the statistics of so many samples are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.audit.call import policy_of
from batchnorm.audit.evidence import Evidence, LayerEvidence, Origin
from batchnorm.audit.gathering import LIMIT, gather
from batchnorm.audit.noise import FEWEST, Noise, noise
from batchnorm.models.calling import Forward, tensors_of
from batchnorm.models.norms import batch_norms
from batchnorm.statistics import Running

__all__ = ["PlannedLayer", "layers_in", "layers_on", "layers_shown"]

NORMAL = 1.5
"""The squared noise of one value per channel: 1 by its mean, 1/2 by the logarithm of its σ."""


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that normalizes with the batch in training.

    - `calls`: in one forward pass; each is synchronized.
    - `positions`: values per channel of one sample; None where no input was given.
    - `least`: how many independent values per channel a sample is worth at least: one, whatever
      its positions; where batches were measured, as many as their noise says.
    - `most`: the same if all positions were independent; None where they are not known. Those of
      an image are not: often they are worth less, and more where images resemble each other.
    - `measured`: the noise of those batches, which were of `samples` samples.
    """

    path: str
    channels: int
    calls: int = 1
    positions: float | None = None
    least: float = 1.0
    most: float | None = None
    measured: Noise | None = None
    samples: float | None = None

    def noise(self, samples: int | float) -> float:
        """The most noise that statistics of so many samples have, in standard deviations.

        √(1.5/values), as rule BN110 measures it; see `batchnorm.audit.noise`.
        """
        return _noise(samples * self.least)

    def least_noise(self, samples: int | float) -> float | None:
        """The same by `most`; None where the positions are not known."""
        return None if self.most is None else _noise(samples * self.most)


def _noise(values: float) -> float:
    return math.sqrt(NORMAL / values)


def layers_in(model: nn.Module) -> list[PlannedLayer]:
    """The layers as they are registered, of which only the channels are known.

    Raises `ValueError` for a lazy layer that has not seen an input.
    """
    layers = []
    for path, layer in batch_norms(model).items():
        if not _normalizes_with_batch(layer, model):
            continue
        if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"{path} is lazy: its channels are not known before it is called; give an input "
                "or batches"
            )
        layers.append(PlannedLayer(path, layer.num_features))
    return layers


def layers_shown(model: nn.Module, example: Any, forward: Forward | None) -> list[PlannedLayer]:
    """The layers in the order of their first calls on an example, with their positions.

    Raises what the model raises.
    """
    return [
        _called(seen, [_samples(example)])
        for seen in _synchronized(gather(model, [example], forward), model)
    ]


def layers_on(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None
) -> list[PlannedLayer]:
    """The same on up to 32 batches, with the noise of their statistics.

    Raises `ValueError` for fewer than 4 batches.
    """
    batches = list(islice(batches, LIMIT))
    if len(batches) < FEWEST:
        raise ValueError(
            f"the noise of statistics is known from {FEWEST} batches on, got {len(batches)}"
        )
    sizes = [_samples(batch) for batch in batches]
    return [
        _measured(seen, _called(seen, sizes), sizes)
        for seen in _synchronized(gather(model, batches, forward), model)
    ]


def _called(seen: LayerEvidence, sizes: Sequence[int]) -> PlannedLayer:
    """A layer, of which nothing but its calls on batches of such sizes is known."""
    calls = _calls(seen)
    values = sum(int(moments.count.max()) for moments in calls.batches)
    positions = values / sum(sizes[number - 1] for number in calls.passes)
    return PlannedLayer(seen.path, seen.channels, len(seen.origins), positions, most=positions)


def _measured(seen: LayerEvidence, layer: PlannedLayer, sizes: Sequence[int]) -> PlannedLayer:
    measured = noise(seen.alike, seen.eps)
    if measured is None:  # called in too few of the passes
        return layer
    passes = _calls(seen).passes
    # noise² goes with 1/samples, and so do the samples that batches of several sizes stand for
    samples = len(passes) / sum(1 / sizes[number - 1] for number in passes)
    values = NORMAL / (measured.value**2 * samples) if measured.value else math.inf
    return replace(layer, least=values, most=values, measured=measured, samples=samples)


def _calls(seen: LayerEvidence) -> Origin:
    """Of its calls in a pass, the first, or the one that most passes have."""
    return max(seen.origins.values(), key=lambda origin: len(origin.batches))


def _synchronized(evidence: Evidence, model: nn.Module) -> list[LayerEvidence]:
    modules = dict(model.named_modules())
    return [s for s in evidence.layers if _normalizes_with_batch(modules[s.path], model)]


def _normalizes_with_batch(layer: nn.Module, model: nn.Module) -> bool:
    """Whether it uses the batch's statistics while the model trains; see `set_training`."""
    trains = layer.training or not any(module.training for module in model.modules())
    return trains and not isinstance(policy_of(layer), Running)


def _samples(batch: Any) -> int:
    """How many a batch has: the first size of its first tensor."""
    for tensor in tensors_of(batch):
        if tensor.ndim:
            return max(1, len(tensor))
    raise ValueError(f"a batch has a tensor, (n, ...), got {type(batch).__name__} without one")

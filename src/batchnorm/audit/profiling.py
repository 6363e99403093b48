"""What a report draws of each layer, from what was seen of it."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.audit.distance import Distance, distance
from batchnorm.audit.evidence import Evidence, LayerEvidence
from batchnorm.audit.noise import FEWEST, noise
from batchnorm.audit.profile import QUANTILES, LayerProfile
from batchnorm.moments import Moments

__all__ = ["dead_channels", "profiles_of", "running_distance"]

DEAD = 1e-3  # how far an output may move, where a channel's with γ = 1 moves by 1


def profiles_of(evidence: Evidence) -> tuple[LayerProfile, ...]:
    """Of every layer that was called, in the order of their first calls."""
    return tuple(_profile(layer) for layer in evidence.layers)


def _profile(layer: LayerEvidence) -> LayerProfile:
    dead = dead_channels(layer)
    return LayerProfile(
        layer.path,
        layer.channels,
        weight=None if layer.weight is None else _quantiles(layer.weight),
        dead=None if dead is None else int(dead.sum()),
        distance=running_distance(layer),
        noise=noise(layer.alike, layer.eps),
        gradients=tuple(layer.gradients),
    )


def running_distance(layer: LayerEvidence) -> Distance | None:
    """Of the running statistics from the batches'; None where one of them is not there.

    A layer that never trained has the statistics that it began with, and one that is frozen is
    not given the batches it would be trained with.
    """
    if layer.running is None or layer.is_frozen or layer.is_new or len(layer.batches) < FEWEST:
        return None
    mean, var = layer.running
    if not (mean.isfinite() & var.isfinite()).all():
        return None
    return distance(mean, var, layer.batches, layer.momentum, layer.eps)


def dead_channels(layer: LayerEvidence) -> Tensor | None:
    """Whose output hardly moves, |γ|·√(var / (var + ε)) < 0.001 on these batches: (c,)."""
    if not layer.batches:
        return None
    var = Moments.merge(layer.batches).var()
    moves = (var / (var + layer.eps)).sqrt()
    if layer.weight is not None:
        moves = moves * layer.weight.abs()
    return moves < DEAD


def _quantiles(values: Tensor) -> tuple[float, ...]:
    return tuple(torch.quantile(values, values.new_tensor(QUANTILES)).tolist())

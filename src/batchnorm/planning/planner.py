"""Whether to synchronize, over how large a group, what it costs, and what it gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from batchnorm.audit.rules.bn110_noisy_statistics import LARGEST
from batchnorm.models.calling import Forward
from batchnorm.planning.answer import Choice, Plan
from batchnorm.planning.layers import PlannedLayer, layers_in, layers_on, layers_shown
from batchnorm.planning.network import LOOPBACK, Network
from batchnorm.planning.traffic import NOTHING, Traffic, backward, forward

__all__ = ["plan", "plan_layers"]


def plan(
    model: nn.Module,
    *,
    ranks: int,
    batch: int,
    example: Any = None,
    batches: Iterable[Any] | None = None,
    network: Network = LOOPBACK,
    max_noise: float = LARGEST,
    step: float | None = None,
    call: Forward | None = None,
) -> Plan:
    """Say over how large groups to synchronize a model's batch norm, at what cost and gain.

    ```python
    plan(model, ranks=1024, batch=4)                     # of one value a sample, the worst case
    plan(model, ranks=1024, batch=4, batches=loader)     # of the values that samples are worth
    ```

    The gain: statistics of n independent normal values per channel move an output by √(1.5/n)
    standard deviations (rule BN110), √k times less in groups of k ranks. A sample is worth one
    such value at least, and as many as it has positions if those are independent; with `batches`,
    as many as their noise says.

    The cost: a collective of 2c + 1 numbers forward and one of 2c backward for each call of a
    layer, in the time that `network` says. What is not in it is the wait for the slowest rank.

    - `ranks`, `batch`: how many there are, and the samples each has in a forward pass.
    - `example`: a batch to run once, which shows positions and calls.
    - `batches`: up to 32 of them are run, as `audit` does, which leaves the model as it was.
    - `network`: by default one measured between processes on one machine; yours is another: see
      `measure_network`.
    - `max_noise`: what is allowed, by default what BN110 allows.
    - `step`: seconds of a step without synchronization, for the cost as a part of it.
    - `call`: how to call the model with a batch, `call(model, batch)`.

    Raises `ValueError` for numbers that are not positive, for a model without a layer that
    normalizes with the batch, and what the model raises.
    """
    if batches is not None:
        layers = layers_on(model, batches, call)
    elif example is not None:
        layers = layers_shown(model, example, call)
    else:
        layers = layers_in(model)
    return plan_layers(
        layers, ranks=ranks, batch=batch, network=network, max_noise=max_noise, step=step
    )


def plan_layers(
    layers: Sequence[PlannedLayer],
    *,
    ranks: int,
    batch: int,
    network: Network = LOOPBACK,
    max_noise: float = LARGEST,
    step: float | None = None,
) -> Plan:
    """As `plan`, of layers that are known already."""
    for what, value in {"ranks": ranks, "batch": batch, "max_noise": max_noise}.items():
        if not value > 0:
            raise ValueError(f"{what} must be above 0, got {value}")
    if step is not None and not step > 0:
        raise ValueError(f"step must be above 0 seconds, got {step}")
    if not layers:
        raise ValueError(
            "there is nothing to synchronize: no layer of the model normalizes with the batch in "
            "training; frozen ones use their running statistics"
        )
    sizes = [k for k in range(1, ranks + 1) if ranks % k == 0]
    choices = tuple(_choice(layers, k, batch, network, max_noise) for k in sizes)
    made = Plan(ranks, batch, tuple(layers), network, max_noise, step, choices, None)
    if made.best is None:
        return made
    noisy = [layer for layer in layers if layer.noise(batch) > max_noise]
    some = _traffic(noisy, made.best.group, network)
    partial = (network.seconds(some), some)
    return Plan(ranks, batch, made.layers, network, max_noise, step, choices, partial)


def _choice(
    layers: Sequence[PlannedLayer], group: int, batch: int, network: Network, max_noise: float
) -> Choice:
    samples = group * batch
    noises = [layer.noise(samples) for layer in layers]
    least = [layer.least_noise(samples) for layer in layers]
    known = [noise for noise in least if noise is not None]
    traffic = _traffic(layers, group, network)
    return Choice(
        group,
        samples,
        max(noises),
        max(known) if len(known) == len(layers) else None,
        sum(noise > max_noise for noise in noises),
        network.seconds(traffic),
        traffic,
    )


def _traffic(layers: Iterable[PlannedLayer], group: int, network: Network) -> Traffic:
    """Of all layers in one step, forward and backward."""
    total = NOTHING
    for layer in layers:
        both = forward(layer.channels, group) + backward(layer.channels, group, network.backend)
        total += both.times(layer.calls)
    return total

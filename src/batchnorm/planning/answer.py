"""The answer to `plan`, as numbers and as people read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.filesize import decimal

from batchnorm.planning.layers import PlannedLayer
from batchnorm.planning.network import Network
from batchnorm.planning.traffic import Traffic
from batchnorm.repair.table import SHOWN, counted, shown, table

__all__ = ["Choice", "Plan"]


@dataclass(frozen=True)
class Choice:
    """Groups of one size: the noise of their statistics, and what a step costs a rank.

    - `noise`: of the noisiest layer, in standard deviations; at most so much.
    - `least_noise`: the same if all positions of a sample were independent; what `noise` is where
      batches were measured, None where the positions are not known.
    - `noisy`: how many layers are noisier than is allowed.
    - `seconds`, `traffic`: of all layers' collectives, forward and backward. Waiting for a slower
      rank is not in it.
    """

    group: int
    samples: int
    noise: float
    least_noise: float | None
    noisy: int
    seconds: float
    traffic: Traffic


@dataclass(frozen=True)
class Plan:
    """What `plan` answers; it prints as a table of group sizes and a sentence.

    - `max_noise`: what is allowed.
    - `step`: seconds of a step without synchronization, where they were given.
    - `choices`: every size of groups that the ranks divide into, from 1 up.
    - `partial`: of the best choice, what it costs to synchronize only the layers that are too
      noisy on one rank; None where there is no best choice.
    """

    ranks: int
    batch: int
    layers: tuple[PlannedLayer, ...]
    network: Network
    max_noise: float
    step: float | None
    choices: tuple[Choice, ...]
    partial: tuple[float, Traffic] | None

    @property
    def best(self) -> Choice | None:
        """The smallest groups whose noise is allowed; None where not even all ranks' is."""
        return next((c for c in self.choices if c.noise <= self.max_noise), None)

    def __repr__(self) -> str:
        return _text(self)


def _text(plan: Plan) -> str:
    """Its tables, and what to do in a sentence."""
    return "\n\n".join([*_layers(plan), _choices(plan), _answer(plan), _network(plan)])


def _time(seconds: float) -> str:
    """`0.12 ms`, `34 ms`, `1.2 s`."""
    if seconds >= 0.9995:  # what is rounded to 1000 ms
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.3g}"


def _layers(plan: Plan) -> list[str]:
    """What was measured of each layer, the noisiest first."""
    measured = [layer for layer in plan.layers if layer.measured is not None]
    if not measured:
        return []
    rows = [
        (
            shown(layer.path),
            str(layer.channels),
            _number(layer.positions or math.nan),
            _number(layer.least),
            f"{layer.noise(plan.batch):.2g} ± {_error(layer, plan.batch):.1g}",
        )
        for layer in sorted(measured, key=lambda layer: layer.least)
    ]
    head = ("layer", "channels", "positions", "worth", "noise of one rank")
    return [
        table(
            "Independent values per channel that a sample is worth, from the noise of batches",
            head,
            rows,
        )
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < math.inf else f"{value:.2g}"


def _error(layer: PlannedLayer, samples: int | float) -> float:
    """Of the noise that batches of other sizes showed."""
    assert layer.measured is not None
    assert layer.samples is not None
    return layer.measured.error * math.sqrt(layer.samples / samples)


def _choices(plan: Plan) -> str:
    head = ["group", "samples", "noise", "too noisy", "a step", "sent by a rank"]
    if plan.step is not None:
        head.append("of the step")
    layers = counted(len(plan.layers), "layer")
    title = f"Plan: {layers}, {counted(plan.ranks, 'rank')} of {counted(plan.batch, 'sample')}"
    return table(title, head, [_row(plan, choice) for choice in _some(plan)])


def _row(plan: Plan, choice: Choice) -> list[str]:
    row = [
        f"{choice.group:,}" + (" ←" if choice == plan.best else ""),
        f"{choice.samples:,}",
        _noise(choice),
        counted(choice.noisy, "layer") if choice.noisy else "",
        _time(choice.seconds),
        decimal(round(choice.traffic.bytes)),
    ]
    return row if plan.step is None else [*row, f"{choice.seconds / plan.step:.1%}"]


def _some(plan: Plan) -> Sequence[Choice]:
    """As many as a table shows, with the first, the best and the last among them."""
    choices = plan.choices
    left_out = len(choices) - SHOWN
    if left_out <= 0:
        return choices
    kept = {0, len(choices) - 1, next((i for i, c in enumerate(choices) if c == plan.best), 0)}
    # the middle of the many large groups says least
    for i in range(len(choices)):
        if len(kept) < SHOWN:
            kept.add(i)
    return [choices[i] for i in sorted(kept)]


def _noise(choice: Choice) -> str:
    most = f"{choice.noise:.2g}"
    if choice.least_noise is None:
        return f"≤ {most}"
    least = f"{choice.least_noise:.2g}"
    return most if least == most else f"{least} to {most}"


def _answer(plan: Plan) -> str:
    alone, best, limit = plan.choices[0], plan.best, f"{plan.max_noise:g}"
    if best is None:
        return (
            f"Not even all ranks bring the noise to {limit}: {_noise(plan.choices[-1])}. Larger "
            "batches, statistics=Renorm() or another norm do; see batchnorm rules BN110."
        )
    if best is alone:
        return (
            f"Do not synchronize: the statistics of {counted(plan.batch, 'sample')} have a noise "
            f"of {_noise(alone)} standard deviations, within {limit}."
        )
    policy = "Sync()" if best.group == plan.ranks else f"Sync.groups_of({best.group})"
    said = (
        f"Synchronize over groups of {best.group:,}, statistics={policy}: a noise of "
        f"{_noise(best)} standard deviations in place of {_noise(alone)}, for "
        f"{_time(best.seconds)} and {decimal(round(best.traffic.bytes))} a step on each rank."
    )
    assert plan.partial is not None
    if alone.noisy < len(plan.layers):
        seconds, traffic = plan.partial
        said += (
            f" Only {counted(alone.noisy, 'layer')} of {len(plan.layers)} need it; those alone "
            f"cost {_time(seconds)} and {decimal(round(traffic.bytes))}."
        )
    if alone.least_noise is not None and alone.least_noise <= plan.max_noise < alone.noise:
        said += (
            " Were all positions of a sample independent, no synchronization would be needed: "
            "how many are, batches of your data tell (batches=, --data)."
        )
    return said


def _network(plan: Plan) -> str:
    network = plan.network
    return (
        f"Times are of {network.name}: {_micro(network.collective)} µs a collective, "
        f"{_micro(network.message)} µs a message, {network.bandwidth / 1e9:.3g} GB/s. Measure "
        "yours: torchrun --nproc-per-node 4 -m batchnorm plan --measure. Waiting for a slower rank "
        "comes on top."
    )

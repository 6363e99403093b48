"""Fill in the tables of docs/synchronization.md from the committed measurements.

    python docs/synchronization.py

It reads benchmarks/sync.json and benchmarks/batch_means.json, which benchmarks/sync.py and
benchmarks/batch_means.py write, and asks `batchnorm.planning` the rest.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sync  # noqa: E402
from memory import TorchNorm, network  # noqa: E402

from batchnorm.planning import (  # noqa: E402
    INFINIBAND,
    LOOPBACK,
    NVLINK,
    Network,
    Plan,
    PlannedLayer,
    plan_layers,
)
from batchnorm.planning.layers import layers_in  # noqa: E402

PAGE = ROOT / "docs" / "synchronization.md"
RANKS = tuple(2**n for n in range(3, 13))
BATCHES = (1, 2, 3, 4, 6, 8)


@cache
def layers_of(name: str) -> tuple[PlannedLayer, ...]:
    """The batch norms of a network, of which the channels are known."""
    return tuple(layers_in(network(sync.NETWORKS[name], TorchNorm)[0]))


def planned(network: Network, ranks: int, batch: int, name: str = "ResNet-50") -> Plan:
    """The answer for one of the networks."""
    return plan_layers(layers_of(name), ranks=ranks, batch=batch, network=network)


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{1e3 * seconds:,.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def megabytes(number: float) -> str:
    """With three digits."""
    return f"{number / 1e6:.3g}" if number < 1e8 else f"{number / 1e6:,.0f}"


def networks(results: dict[str, Any]) -> str:
    """The numbers of each network, and where they come from."""
    rows = [
        [
            each.name,
            f"{1e6 * each.collective:.4g}",
            f"{1e6 * each.message:.4g}",
            f"{each.bandwidth / 1e9:.3g}",
        ]
        for each in (LOOPBACK, NVLINK, INFINIBAND)
    ]
    return table(["network", "α, µs a collective", "λ, µs a message", "1/β, GB/s"], rows)


def prediction(results: dict[str, Any]) -> str:
    """What synchronizing added to steps, measured and by the model."""
    rows = []
    for row in results["steps"]:
        if row["world"] == 1:
            continue
        measured = {kind: statistics.median(s) for kind, s in row["seconds"].items()}
        added = measured[sync.OURS] - measured[sync.PLAIN]
        (choice,) = (
            c
            for c in planned(LOOPBACK, row["world"], 1, row["network"]).choices
            if c.group == row["world"]
        )
        share = sync.share(row["world"], results["cores"])
        rows.append(
            [
                f"{row['network']}, {row['part']}",
                str(row["world"]),
                milliseconds(measured[sync.PLAIN]),
                milliseconds(added),
                milliseconds(choice.seconds * share),
                f"{choice.seconds * share / added:.2f}",
            ]
        )
    head = ["step", "processes", "unsynchronized, ms", "added, ms", "predicted, ms", "ratio"]
    return table(head, rows)


def groups(results: dict[str, Any]) -> str:
    """The smallest group whose noise is allowed, for every batch; the same for 8 to 4,096 ranks."""
    rows = []
    for batch in BATCHES:
        answers = [planned(LOOPBACK, ranks, batch) for ranks in RANKS]
        best = answers[0].best
        assert best is not None
        assert all(answer.best == best for answer in answers)
        nvlink = planned(NVLINK, 8, batch).best
        assert nvlink is not None
        alone = answers[0].choices[0]
        rows.append(
            [
                str(batch),
                f"{alone.noise:.2f}",
                "none" if best.group == 1 else f"{best.group}",
                f"{best.noise:.2f}",
                milliseconds(best.seconds),
                milliseconds(nvlink.seconds),
                megabytes(best.traffic.bytes),
                megabytes(nvlink.traffic.bytes),
            ]
        )
    return table(
        [
            "samples a rank",
            "noise alone, at most",
            "group",
            "noise in it, at most",
            "a step on loopback, ms",
            "on NVLink, ms",
            "sent on gloo, MB",
            "on NCCL, MB",
        ],
        rows,
    )


def sizes(results: dict[str, Any]) -> str:
    """What groups of every size cost and gain, up to all of 4,096 ranks."""
    rows = []
    answers = [planned(each, RANKS[-1], 4) for each in (LOOPBACK, NVLINK, INFINIBAND)]
    for loopback, nvlink, infiniband in zip(*(a.choices for a in answers), strict=True):
        rows.append(
            [
                f"{loopback.group:,}",
                f"{loopback.samples:,}",
                f"{loopback.noise:.2g}",
                milliseconds(loopback.seconds),
                milliseconds(nvlink.seconds) if nvlink.group <= 8 else "",
                milliseconds(infiniband.seconds),
                megabytes(loopback.traffic.bytes),
                megabytes(infiniband.traffic.bytes),
            ]
        )
    return table(
        [
            "group",
            "samples",
            "noise, at most",
            "a step on loopback, ms",
            "on NVLink, ms",
            "over InfiniBand, ms",
            "sent on gloo, MB",
            "on NCCL, MB",
        ],
        rows,
    )


def means(data: dict[str, Any]) -> str:
    """Variance of the batch mean against the values per channel, on digits."""
    rows = [
        [
            f"`{path}`",
            str(size),
            f"{size * row['positions']:,.0f}",
            f"{row['var'][str(size)]:.2g}",
            f"{1 / (size * row['positions']):.2g}",
            f"{1 / size:.2g}",
        ]
        for path, row in data["digits"].items()
        for size in (2, 32, 256)
    ]
    head = [
        "layer",
        "samples",
        "values per channel",
        "variance of the mean",
        "independent values",
        "one value a sample",
    ]
    return table(head, rows)


def worth(data: dict[str, Any], name: str) -> str:
    """What samples are worth, and the noise that follows from it beside the one measured."""
    rows = []
    for path, row in data[name].items():
        layer = PlannedLayer(path, 1, least=row["worth"])
        both = [f"{row['noise'][str(n)]:.2g} ({layer.noise(n):.2g})" for n in (2, 8, 32)]
        rows.append([f"`{path}`", f"{row['positions']:,.0f}", f"{row['worth']:.1f}", *both])
    head = ["layer", "positions", "a sample is worth", *(f"noise of {n}" for n in (2, 8, 32))]
    return table(head, rows)


def largest_error(data: dict[str, Any]) -> str:
    """How far the predictions of noise are off."""
    rows = []
    for name in ("digits", "photographs"):
        sizes = list(next(iter(data[name].values()))["noise"])
        errors = {
            size: [
                PlannedLayer("", 1, least=row["worth"]).noise(int(size)) / row["noise"][size]
                for row in data[name].values()
            ]
            for size in sizes
        }
        rows += [
            [name, size, f"{min(each):.2f}", f"{statistics.median(each):.2f}", f"{max(each):.2f}"]
            for size, each in errors.items()
        ]
    return table(["data", "samples", "predicted / measured, least", "median", "most"], rows)


def measured_groups(data: dict[str, Any]) -> str:
    """The same question where noise was measured: of which layers, and over how large groups."""
    rows = []
    for name in ("digits", "photographs"):
        layers = [
            PlannedLayer(path, 1, least=row["worth"], most=row["worth"])
            for path, row in data[name].items()
        ]
        for batch in (1, 2, 4):
            answer = plan_layers(layers, ranks=RANKS[0], batch=batch)
            alone, best = answer.choices[0], answer.best
            assert best is not None
            bound = plan_layers([replace(layers[0], least=1.0)], ranks=RANKS[0], batch=batch).best
            assert bound is not None
            rows.append(
                [
                    name,
                    str(batch),
                    f"{alone.noise:.2f}",
                    f"{alone.noisy} of {len(layers)}",
                    str(best.group) if best.group > 1 else "none",
                    str(bound.group) if bound.group > 1 else "none",
                ]
            )
    head = [
        "data",
        "samples a rank",
        "noise of the noisiest layer",
        "too noisy",
        "group",
        "group by the bound",
    ]
    return table(head, rows)


def tables() -> Iterator[tuple[str, str]]:
    """Every table of the page, by its name there."""
    results = json.loads((ROOT / "benchmarks" / "sync.json").read_text("utf-8"))
    data = json.loads((ROOT / "benchmarks" / "batch_means.json").read_text("utf-8"))
    of_results: list[Callable[[dict[str, Any]], str]] = [networks, prediction, groups, sizes]
    for made in of_results:
        yield made.__name__, made(results)
    yield "means", means(data)
    yield "digits", worth(data, "digits")
    yield "photographs", worth(data, "photographs")
    yield "errors", largest_error(data)
    yield "measured", measured_groups(data)


def filled(page: str) -> str:
    """The page with its tables as they are now.

    Raises `ValueError` for a table that the page has not, and for one that no function makes.
    """
    made = dict(tables())
    places = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(places) != sorted(made):
        raise ValueError(f"the page has the tables {sorted(places)}, there are {sorted(made)}")
    for name, text in made.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}{text}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")

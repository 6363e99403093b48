"""What `gpu_layers.py` measures against: the least passes over memory, and the goals.

A row is what `gpu_cases.measure` gives: of each way and candidate the seconds of a pass, and how
many times ours they are, as median, 20th and 80th percentile.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

Row = dict[str, Any]
WAYS = ("on the device", "as called")
EAGER, NATIVE, DEFAULT, TUNED = "eager", "native", "compile", "max-autotune"
OURS, OURS_COMPILED = "ours", "ours compiled"
PARTS = ("forward", "backward", "both")
BANDWIDTH, EAGER_GOAL, COMPILE_GOAL = 0.85, 1.5, 1.15


class Passes(NamedTuple):
    """How often a tensor of x's size is read or written at least."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


def passes(operation: str, frozen: bool) -> Passes:
    """The least passes over memory, for tensors that no cache holds.

    In training the statistics need all of x before the first output can be computed, and the
    gradient's two sums all of dy and x before the first dx, so that these are read twice:

    - forward: x for the statistics; x again, and y written: 3. A residual is read once: 4.
    - backward: dy and x for the sums; dy and x again, and dx written: 5. The ReLU's mask is
      computed again from what is read. With a residual: dy, x and the residual for the sums,
      where the residual's gradient g is written; g and x again, and dx written: 7.

    Frozen, nothing waits for a sum, and γ's and β's gradients fall out of the same sweep:

    - forward: x, and y written: 2. With a residual 3.
    - backward: dy and x, and dx written: 3. With a residual it is read too, and its gradient
      written: 5.
    """
    has_residual = operation == "BN+add+ReLU"
    if frozen:
        return Passes(3, 5) if has_residual else Passes(2, 3)
    return Passes(4, 7) if has_residual else Passes(3, 5)


def share(row: Row, part: str) -> float:
    """Bytes per second of the least passes, ours, over those of the copy."""
    least = getattr(passes(row["operation"], row["frozen"]), part)
    seconds = row["on the device"]["seconds"][OURS][part][0]
    return least * row["bytes"] / seconds / (2 * row["bytes"] / row["copy"][0])


def speedup(row: Row, way: str, name: str, part: str = "both") -> float | None:
    """How many times ours another takes; None where it was not measured."""
    ratios = row[way]["over ours"].get(name)
    return None if ratios is None else ratios[part][0]


class Goal(NamedTuple):
    """What was to be reached, and what was found in how many rows; None where nothing was."""

    name: str
    wanted: float
    found: float | None
    rows: int
    where: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "reached" if self.found >= self.wanted else "missed"


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def goals(rows: list[Row]) -> list[Goal]:
    """The goals, forward and backward together, over the rows that were timed."""
    return [*_bandwidth(rows), *_never_slower(rows), *_means(rows)]


def _bandwidth(rows: list[Row]) -> list[Goal]:
    shares = [
        (share(row, "both"), row)
        for row in rows
        if row["large"] and not row["frozen"] and row["operation"] != "BN+add+ReLU"
        if OURS in row["on the device"]["seconds"]
    ]
    middle = statistics.median(s for s, _ in shares) if shares else None
    name = "share of the copy's bandwidth at 8 passes, large tensors"
    return [
        _least(f"{name}: least", BANDWIDTH, shares),
        Goal(f"{name}: median", BANDWIDTH, middle, len(shares)),
    ]


def _never_slower(rows: list[Row]) -> list[Goal]:
    found = []
    for way in WAYS:
        ratios = [
            (value, row)
            for row in rows
            for name in (EAGER, NATIVE)
            if (value := speedup(row, way, name)) is not None
        ]
        found.append(_least(f"never slower than eager or native, {way}: least", 1.0, ratios))
    return found


def _means(rows: list[Row]) -> list[Goal]:
    asked = [
        row
        for row in rows
        if (row["operation"], row["frozen"]) == ("BN+ReLU", False)
        if (row["dtype"], row["layout"]) == ("bf16", "channels_last")
    ]
    found = []
    for name, wanted in ((EAGER, EAGER_GOAL), (DEFAULT, COMPILE_GOAL), (TUNED, COMPILE_GOAL)):
        for way in WAYS:
            values = [value for row in asked if (value := speedup(row, way, name)) is not None]
            mean = geometric_mean(values) if values else None
            about = f"BN+ReLU over {name}, bf16 channels_last, {way}: geometric mean"
            found.append(Goal(about, wanted, mean, len(values)))
    return found


def _least(name: str, wanted: float, found: list[tuple[float, Row]]) -> Goal:
    if not found:
        return Goal(name, wanted, None, 0)
    value, row = min(found, key=lambda pair: pair[0])
    return Goal(name, wanted, value, len(found), case_of(row))


def case_of(row: Row) -> str:
    mode = "frozen" if row["frozen"] else "training"
    return f"{row['shape']}, {row['dtype']}, {row['layout']}, {row['operation']}, {mode}"


def goal_table(found: list[Goal]) -> list[str]:
    lines = ["| goal | wanted | found | of rows | |", "|---|---|---|---|---|"]
    for goal in found:
        value = "–" if goal.found is None else f"{goal.found:.2f}"
        where = f" ({goal.where})" if goal.where else ""
        lines.append(
            f"| {goal.name} | {goal.wanted:.2f} | {value}{where} | {goal.rows} | {goal.verdict} |"
        )
    return lines

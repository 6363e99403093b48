"""The layers on a GPU: BN, BN + ReLU and BN + add + ReLU, in training and frozen.

    python benchmarks/gpu_layers.py --output benchmarks/results/gpu_layers_bf16.md
    python benchmarks/gpu_layers.py --dry-run

Ratios are the other's time over ours: above 1 we are faster. *On the device* is the time of the
kernels alone, replayed from CUDA graphs, everybody's alike; *as called* that of a single call from
Python on an idle device, launches included. In brackets the 20th and 80th percentile of the
rounds' ratios. *Eager* is torch.nn's layer with cuDNN on, and *native* with it off, where PyTorch
takes cuDNN at all; the column *torch takes* says what it takes. torch.compile's two candidates
run without CUDA graphs of their own, for these copy the inputs, and on a few shapes only, since
each compilation takes seconds. Bandwidth counts the least passes over memory that an operation
needs (see `passes`), and is a share of that of a copy of the same tensor, device to device, whose
bytes count twice. A tensor that fits the L2 cache is in part read from there the second time, so
that a share above 100 % is no mistake; *large* tensors are no smaller than the cache. γ and β
learn in the frozen mode too. Ours was compared with torch in float64 before it was timed, outputs,
gradients and running statistics; what is wrong is not timed. `gpu_timing.py` holds the method.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import gpu_timing
from gpu_goals import (
    DEFAULT,
    EAGER,
    NATIVE,
    OURS,
    OURS_COMPILED,
    PARTS,
    TUNED,
    WAYS,
    Row,
    case_of,
    geometric_mean,
    goal_table,
    goals,
    passes,
    share,
    speedup,
)


def summary_lines(rows: list[Row]) -> list[str]:
    """Geometric means and the least of each operation and mode, over torch eager."""
    lines = [
        "| forward and backward, over eager | geometric mean on the device | least "
        "| as called | least | share of the copy, large: median |",
        "|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys((r["dtype"], r["layout"], r["operation"], r["frozen"]) for r in rows)
    for kind in kinds:
        some = [r for r in rows if (r["dtype"], r["layout"], r["operation"], r["frozen"]) == kind]
        cells = []
        for way in WAYS:
            values = [v for r in some if (v := speedup(r, way, EAGER)) is not None]
            cells += [f"{f(values):.2f}" if values else "–" for f in (geometric_mean, min)]
        large = [share(r, "both") for r in some if r["large"] and OURS in r[WAYS[0]]["seconds"]]
        cells.append(f"{statistics.median(large):.0%}" if large else "–")
        dtype, layout, operation, frozen = kind
        mode = "frozen" if frozen else "training"
        lines.append(f"| {operation}, {mode}, {dtype}, {layout} | {' | '.join(cells)} |")
    return lines


def table(rows: list[Row]) -> list[str]:
    names = [
        *("shape", "dtype, layout", "operation", "torch takes", "sets", "copy, µs", "ours, µs"),
        *("GB/s", "of the copy: forward", "backward", "both"),
        *("eager / ours: forward", "backward", "both", "native / ours", "compile / ours"),
        *("max-autotune / ours", "ours compiled / ours", "as called: eager / ours"),
        "compile / ours",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        mode = ", frozen" if row["frozen"] else ""
        sets = f"{row['sets']}" if row["past cache"] else f"{row['sets']}, in the cache"
        cells = [row["shape"], f"{row['dtype']}, {row['layout']}", row["operation"] + mode]
        cells += [row["torch takes"], sets, f"{row['copy'][0] * 1e6:.1f}"]
        ours = row["on the device"]["seconds"].get(OURS)
        if ours is None:
            cells += ["–"] * 5
        else:
            seconds = ours["both"][0]
            least = passes(row["operation"], row["frozen"]).both * row["bytes"]
            cells += [f"{seconds * 1e6:.1f}", f"{least / seconds / 1e9:.0f}"]
            cells += [f"{share(row, part):.0%}" for part in PARTS]
        for way, name, part in (
            *((WAYS[0], EAGER, part) for part in PARTS),
            *((WAYS[0], name, "both") for name in (NATIVE, DEFAULT, TUNED, OURS_COMPILED)),
            *((WAYS[1], name, "both") for name in (EAGER, DEFAULT)),
        ):
            ratios = row[way]["over ours"].get(name)
            cells.append("" if ratios is None else _told(ratios[part]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _told(ratio: tuple[float, float, float]) -> str:
    median, low, high = ratio
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def trouble(rows: list[Row], left: int) -> list[str]:
    """What was not measured, and why."""
    lines = [f"- failed: {case_of(r)}: {r['failed']}" for r in rows if "failed" in r]
    lines += [
        f"- wrong, and not timed: {case_of(r)}: {', '.join(r['wrong'])}, errors {r['errors']}"
        for r in rows
        if r.get("wrong")
    ]
    reasons = Counter(
        (name, reason) for r in rows for name, reason in r.get("left out", {}).items()
    )
    lines += [f"- {n} left out in {k} cases: {why}" for (n, why), k in reasons.items()]
    if left:
        lines.append(
            f"- time ran out before {left} cases; run them with --layout, or more --minutes"
        )
    return lines or ["- nothing"]


def worst_errors(rows: list[Row]) -> list[str]:
    """The largest error of each kind and dtype, of what was timed."""
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        for name, error in row["errors"].items():
            key = row["dtype"], name
            worst[key] = max(worst.get(key, 0.0), error)
    return [f"- {dtype}, {name}: {error:.1e}" for (dtype, name), error in worst.items()]


def page(rows: list[Row], left: int, machine: str, dry_run: bool) -> str:
    timed = [row for row in rows if "copy" in row]
    about = (__doc__ or "").split("\n\n", 2)[2]
    text = ["# The layers on a GPU", ""]
    if dry_run:
        text += [gpu_timing.DRY, ""]
    text += [machine, "", about, "## Goals", "", *goal_table(goals(timed)), "", "## Summary", ""]
    text += [*summary_lines(timed), "", "## Every case", "", *table(timed), ""]
    text += ["## Not measured", "", *trouble(rows, left), ""]
    text += ["## The largest errors against float64", "", *worst_errors(timed), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16"])
    layouts = ("channels_last", "contiguous")
    parser.add_argument("--layout", nargs="+", choices=layouts, default=["channels_last"])
    parser.add_argument("--shapes", choices=("quick", "full"), default="full")
    parser.add_argument("--seconds", type=float, default=0.25, help="about, a case and way")
    parser.add_argument("--minutes", type=float, default=8, help="start no case after these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="write the page here, and rows as .json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    args = parser.parse_args()
    begun = time.monotonic()
    gpu_timing.refuse_dry_results(args.output, args.dry_run)
    device = gpu_timing.device_for(args.dry_run)
    import gpu_cases  # and with it batchnorm, which reads the dry run's switch

    full = gpu_cases.SHAPES if args.shapes == "full" else gpu_cases.QUICK
    shapes = gpu_cases.TINY if args.dry_run else full
    compiled = not args.no_compile and not args.dry_run
    todo = gpu_cases.cases(shapes, args.dtype, args.layout, compiled)
    machine, text = gpu_timing.describe(device), ""
    rows: list[Row] = []
    for row in gpu_cases.rows_of(todo, device, None if args.dry_run else args.seconds):
        rows.append(row)
        print(f"{len(rows)} of {len(todo)}: {case_of(row)}", file=sys.stderr)
        text = page(rows, len(todo) - len(rows), machine, args.dry_run)
        if args.output is not None:  # each time: what was measured stays if this is stopped
            gpu_timing.write(args.output, text, {"machine": machine, "rows": rows})
        if time.monotonic() - begun > args.minutes * 60:
            break
    print(text)


if __name__ == "__main__":
    main()

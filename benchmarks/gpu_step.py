"""A training step of ResNet-50 on a GPU: time, memory, and where the time goes.

    python benchmarks/gpu_step.py --output benchmarks/results/gpu_step.md
    python benchmarks/gpu_step.py --dry-run

SGD with momentum, bf16 by autocast, channels_last, random images and labels. *Ours* is the network
after `batchnorm.convert(model, to="batchnorm", fuse=True)`; with *additions fused*, its residual
units also call their last norm with `residual=`, which is an edit of the network's code (see
`gpu_networks.py`); *rematerialized* is `batchnorm.rematerialize(model)`. Before anything is timed,
the loss and gradients of each of ours in float32 are compared with torch's in float64.

Steps are timed in turns in one process that holds all variants, so that clocks and heat are alike;
parameters and momentum of the others take memory there, but activations live for one step only.
Memory, kernels and the largest batch are measured in a process each, so that nobody finds another's
memory in its allocator. Peak memory is `torch.cuda.max_memory_allocated` over one step after
warm-up, and what the forward pass keeps is what was allocated more after it than before. The
largest batch is searched within a cap on the process's memory, which stands for a smaller GPU, in
steps of 8 images.
Time per kernel is PyTorch's profiler's, over three steps: *batch norm, ReLU and addition* are the
kernels named so, with the additions of gradients where a tensor is used twice; small operations on
statistics count as others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from gpu_goals import Goal, goal_table
from gpu_kernels import NORM, kernels
from timing import laps_in_turns, ratio_spread, spread

SPEED_GOAL, BATCH_GOAL = 1.15, 1.3
AS_FAR, LEAST = 3.0, 1e-5  # from float64 as torch's own float32 is, or nearly none
PARTS = ("forward", "backward", "optimizer")


def times(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of the variants' steps, in turns, and how many times ours each takes."""
    import gpu_networks

    found = errors(args, device)
    torch.backends.cudnn.benchmark = True  # as training scripts set it
    trainings = {v: gpu_networks.Training(args.model, v, device) for v in args.variants}
    batches = [
        gpu_networks.random_batch(args.batch, args.image, args.classes, device) for _ in range(2)
    ]

    def laps(training: gpu_networks.Training) -> Any:
        def one() -> Iterator[None]:
            batches.reverse()
            yield from training.step(batches[0])

        return one

    work = {name: laps(training) for name, training in trainings.items()}
    clock = gpu_timing.clock_of(device)
    rounds = laps_in_turns(work, args.rounds, clock, warm_up=0 if args.dry_run else 5)
    for name, training in trainings.items():
        if not training.loss(batches[0]).isfinite():
            raise SystemExit(f"{name}: the loss is not finite")
    whole = {name: [sum(lap) for lap in laps] for name, laps in rounds.items()}
    eager = whole.get(gpu_networks.EAGER)
    return {
        "errors": found,
        "seconds": {name: spread(t) for name, t in whole.items()},
        "eager over": {name: ratio_spread(eager, t) for name, t in whole.items() if eager},
        "parts": {
            name: [statistics.median(lap[i] for lap in laps) for i in range(len(PARTS))]
            for name, laps in rounds.items()
        },
    }


def errors(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """How far each variant's float32 loss and gradients are from torch's in float64.

    Exits where ours are much further than torch's own in float32: the error of those says how a
    network of this depth enlarges rounding.
    """
    import gpu_networks as n

    few = n.random_batch(4 if args.dry_run else 8, args.image, args.classes, device)
    wanted = n.gradients(args.model, n.EAGER, few, device, torch.float64)
    ours = [v for v in args.variants if v.startswith(n.OURS)]
    found = {
        variant: gpu_timing.relative_error(
            n.gradients(args.model, variant, few, device, torch.float32), wanted
        )
        for variant in (n.EAGER, *ours)
    }
    wrong = {v: found[v] for v in ours if not found[v] <= AS_FAR * found[n.EAGER] + LEAST}
    if wrong:
        raise SystemExit(f"wrong gradients, nothing is timed: {wrong} of {found}")
    gpu_timing.release()
    return found


def use(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Memory, kernels and the largest batch of the one variant that is named."""
    import gpu_networks

    (variant,) = args.variants
    torch.backends.cudnn.benchmark = True
    training = gpu_networks.Training(args.model, variant, device)
    batch = gpu_networks.random_batch(args.batch, args.image, args.classes, device)
    training.steps([batch] * (1 if args.dry_run else 3))
    found: dict[str, Any] = memory(training, batch, device)
    found["kernels"] = kernels(training, [batch] * (1 if args.dry_run else 3), device)
    del batch
    if variant != gpu_networks.COMPILED or args.fit_compiled:
        found["fits"] = fitting(training, args, device)
    return found


def memory(training: Any, batch: Any, device: torch.device) -> dict[str, int]:
    """Bytes that a step takes at its peak, all of them, and that its forward pass keeps."""
    if device.type != "cuda":
        return {"peak": 0, "kept": 0}
    gpu_timing.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, kept = torch.cuda.memory_allocated(), 0
    for i, _ in enumerate(training.step(batch)):
        if i == 0:
            kept = torch.cuda.memory_allocated() - before
    return {"peak": torch.cuda.max_memory_allocated(), "kept": kept}


def fitting(training: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The largest batch that fits under the cap, and the smallest that was seen not to."""
    import gpu_networks

    torch.backends.cudnn.benchmark = False  # trying algorithms takes memory itself
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 2**30 / total))

    def fits(size: int) -> bool:
        if device.type != "cuda":
            return size <= 6  # to see that the search works
        try:
            batch = gpu_networks.random_batch(size, args.image, args.classes, device)
            training.steps([batch] * 2)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def tried(size: int) -> bool:
        fitted = fits(size)
        training.optimizer.zero_grad()  # what a step that broke off left
        gpu_timing.release()
        print(f"batch {size}: {'fits' if fitted else 'does not fit'}", file=sys.stderr)
        return fitted

    step, start = (1, 4) if args.dry_run else (8, 128)
    low, high = gpu_networks.largest_that_fits(tried, start, step, args.trials)
    return {"largest": low, "smallest not": high, "cap": args.cap}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, also where a library says so in words of its own."""
    words = ("out of memory", "unable to find an engine", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def goals(found: dict[str, Any]) -> list[Goal]:
    """The goals, from the parts that were measured."""
    import gpu_networks as n

    speeds, fits = found.get("times", {}).get("eager over", {}), {}
    for variant, used in found["use"].items():
        if used.get("fits"):
            fits[variant] = used["fits"]["largest"]
    lines = []
    for variant in (n.OURS, n.ADDED):
        speed = speeds.get(variant, [None])[0]
        about = f"speed of a step over eager's: {variant}"
        lines.append(Goal(about, SPEED_GOAL, speed, int(speed is not None)))
    for variant in (n.REMATERIALIZED, n.ADDED_REMATERIALIZED):
        both = fits.get(n.EAGER) and fits.get(variant)
        more = fits[variant] / fits[n.EAGER] if both else None
        about = f"largest batch over eager's: {variant}"
        lines.append(Goal(about, BATCH_GOAL, more, int(more is not None)))
    return lines


def steps_table(found: dict[str, Any], variants: list[str]) -> list[str]:
    names = [
        *("variant", "step, ms", "eager / this", "forward, ms", "backward", "optimizer"),
        *("peak memory, GB", "kept by forward, GB", "largest batch", NORM + ", ms", "share"),
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    measured = found.get("times", {})
    for variant in variants:
        cells, used = [variant], found["use"].get(variant, {})
        if variant in measured.get("seconds", {}):
            cells.append(
                "{:.1f} ({:.1f} to {:.1f})".format(*(1e3 * t for t in measured["seconds"][variant]))
            )
            over = measured["eager over"].get(variant)
            cells.append("" if over is None else "{:.2f} ({:.2f} to {:.2f})".format(*over))
            cells += [f"{1e3 * t:.1f}" for t in measured["parts"][variant]]
        else:
            cells += ["–"] * 5
        cells += [f"{used[f] / 1e9:.2f}" if f in used else "–" for f in ("peak", "kept")]
        fits = used.get("fits")
        cells.append("–" if not fits else f"{fits['largest']}")
        if "kernels" in used:
            kinds = used["kernels"]["kinds"]
            norm = kinds.get(NORM, 0.0)
            cells += [f"{1e3 * norm:.1f}", f"{norm / sum(kinds.values()):.0%}"]
        else:
            cells += ["–"] * 2
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kinds_table(found: dict[str, Any]) -> list[str]:
    """Where the device's time goes, in ms of a step."""
    used = {v: u["kernels"]["kinds"] for v, u in found["use"].items() if "kernels" in u}
    kinds = list(dict.fromkeys(kind for each in used.values() for kind in each))
    lines = [f"| ms | {' | '.join(used)} |", "|---" * (len(used) + 1) + "|"]
    lines += [
        f"| {kind} | {' | '.join(f'{1e3 * each.get(kind, 0):.2f}' for each in used.values())} |"
        for kind in kinds
    ]
    return lines


def top_kernels(found: dict[str, Any]) -> list[str]:
    lines = []
    for variant, used in found["use"].items():
        lines += [f"### {variant}", "", "| kernel | ms |", "|---|---|"]
        for name, seconds in used.get("kernels", {}).get("names", {}).items():
            told = name if len(name) < 100 else f"{name[:97]}…"
            lines.append(f"| `{told.replace('|', '/')}` | {1e3 * seconds:.3f} |")
        lines.append("")
    return lines


def page(found: dict[str, Any], args: argparse.Namespace) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2]
    text = [f"# A training step of {args.model} on a GPU", ""]
    if args.dry_run:
        text += [gpu_timing.DRY, ""]
    text += [found["machine"], "", f"Batch {args.batch}, images of {args.image}×{args.image}; "]
    text[-1] += f"the largest batch within {args.cap:g} GiB; {args.rounds} rounds."
    text += ["", about, *goal_table(goals(found)), "", *steps_table(found, args.variants), ""]
    text += ["## Where the time goes", "", *kinds_table(found), "", *top_kernels(found)]
    text += ["## Not measured", "", *(found["failed"] or ["- nothing"]), ""]
    return "\n".join(text)


def in_a_process(args: argparse.Namespace, role: str, variants: list[str]) -> dict[str, Any]:
    """What a role finds, in a process of its own; its messages go where ours do."""
    command = [sys.executable, __file__, "--role", role, "--variants", *variants]
    for name in ("model", "batch", "image", "classes", "rounds", "cap", "trials"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--dry-run"] * args.dry_run + ["--fit-compiled"] * args.fit_compiled
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="pytorchcv's name, or package.module:function")
    parser.add_argument("--variants", nargs="+", help="which; by default all")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--image", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--rounds", type=int, help="of steps in turns")
    parser.add_argument("--cap", type=float, default=16, help="GiB for the largest batch")
    parser.add_argument("--trials", type=int, default=10, help="of batches, at most")
    parser.add_argument("--fit-compiled", action="store_true", help="search torch.compile's too")
    parser.add_argument("--output", type=Path, help="write the page here, and numbers as .json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    parser.add_argument("--role", choices=("times", "use"), help="one part as JSON; for itself")
    args = parser.parse_args()
    tiny, usual = ("gpu_networks:tiny", 4, 8, 10, 1), ("resnet50", 256, 224, 1000, 25)
    names = ("model", "batch", "image", "classes", "rounds")
    for name, value in zip(names, tiny if args.dry_run else usual, strict=True):
        setattr(args, name, getattr(args, name) or value)
    return args


def main() -> None:
    args = arguments()
    gpu_timing.refuse_dry_results(args.output, args.dry_run)
    device = gpu_timing.device_for(args.dry_run)
    if args.role is not None:
        print(json.dumps({"times": times, "use": use}[args.role](args, device)))
        return
    import gpu_networks

    few = (gpu_networks.EAGER, gpu_networks.OURS, gpu_networks.ADDED_REMATERIALIZED)
    args.variants = args.variants or list(few if args.dry_run else gpu_networks.VARIANTS)
    unknown = sorted(set(args.variants) - set(gpu_networks.VARIANTS))
    if unknown:  # seen only now, for the variants' module imports batchnorm, which reads a switch
        known = ", ".join(map(repr, gpu_networks.VARIANTS))
        raise SystemExit(f"--variants must be among {known}; got {', '.join(map(repr, unknown))}")
    found: dict[str, Any] = {"machine": gpu_timing.describe(device), "use": {}, "failed": []}
    text = ""
    for role, variants in (("times", args.variants), *(("use", [v]) for v in args.variants)):
        try:
            got = in_a_process(args, role, variants)
        except subprocess.CalledProcessError as error:  # the others' numbers stay
            found["failed"].append(f"- {role} of {', '.join(variants)}: exit {error.returncode}")
        else:
            if role == "times":
                found["times"] = got
            else:
                found["use"][variants[0]] = got
        text = page(found, args)
        if args.output is not None:  # each time: what was measured stays if this is stopped
            gpu_timing.write(args.output, text, found)
    print(text)


if __name__ == "__main__":
    main()

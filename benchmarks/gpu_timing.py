"""How the benchmarks on a GPU measure: the method of `timing.py`, with the device's own clock.

Each pass is timed in two ways, the candidates in turns in one process in both:

- *on the device*: passes over all input sets, one after the other, are captured in a CUDA graph,
  each candidate's alike, and the graph's replays are timed. No Python runs between the kernels.
- *as called*: a single pass between two device events, on an idle device. Where the kernels are
  short, this is the time that Python takes to launch them.

Input sets are rotated, so many that they exceed the L2 cache several times: a pass finds nothing
there that the last one left. The ceiling is a measured copy of the same tensors, device to device,
whose bytes count twice: read and written. On the CPU all of this runs with the processor's clock
and plain calls in place of graphs, to see that a script works; those numbers mean nothing.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import HOST, Clock, laps_in_turns, machine
from torch import Tensor

SEVERAL = 4  # caches that the input sets exceed
FEWEST_SETS, MOST_SETS = 2, 128  # more of tiny ones would be thousands of launches in a graph
FEWEST_ROUNDS, MOST_ROUNDS = 9, 200
LEAD = 1_000_000  # cycles, about half a millisecond: a graph of a thousand kernels is launched
RESULTS = Path(__file__).parent / "results"
DRY = "**Dry run: no numbers mean anything.**"


class DeviceClock:
    """Events on the device, whose times are read when the last has passed.

    `lead`: have the device wait before the first, so that what is launched in the meantime starts
    without a gap. Without it the host's work to launch counts.
    """

    def __init__(self, lead: bool) -> None:
        self._lead, self._begun = lead, False

    def mark(self) -> torch.cuda.Event:
        if self._lead and not self._begun:
            torch.cuda._sleep(LEAD)
        self._begun = True
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, marks: list[torch.cuda.Event]) -> tuple[float, ...]:
        marks[-1].synchronize()
        self._begun = False
        return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def clock_of(device: torch.device, lead: bool = False) -> Clock:
    return DeviceClock(lead) if device.type == "cuda" else HOST


def cache_of(device: torch.device) -> int:
    """Bytes of the device's L2 cache; of a CPU's, which only dry runs ask for, none."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def sets_needed(touched: int, cache: int) -> int:
    """How many sets, of each of which a pass touches so many bytes, exceed the cache.

    `SEVERAL` times, but within `FEWEST_SETS` and `MOST_SETS`; see `is_past_cache`.
    """
    return min(MOST_SETS, max(FEWEST_SETS, SEVERAL * cache // touched + 1))


def is_past_cache(touched: int, cache: int) -> bool:
    """Whether so many sets are within bounds: tiny tensors stay in the cache here, as elsewhere."""
    return sets_needed(touched, cache) * touched > SEVERAL * cache


@dataclass(frozen=True)
class Candidate:
    """A pass over one of several input sets, by its number.

    - `forward`: the output.
    - `backward`: gradients of an output of set i; `keep` says that there will be another of it.
    """

    forward: Callable[[int], Tensor]
    backward: Callable[[Tensor, int, bool], object]


Laps = Callable[[], Iterator[None]]


def called(candidate: Candidate, sets: int) -> Laps:
    """A forward and a backward pass as Python calls them, each time of the next set."""
    turn = itertools.cycle(range(sets))

    def laps() -> Iterator[None]:
        i = next(turn)
        y = candidate.forward(i)
        yield
        candidate.backward(y, i, False)
        yield

    return laps


def replayed(candidate: Candidate, sets: int, device: torch.device) -> Laps:
    """All sets' forward passes, all their backward passes, and both in turns, without Python.

    Outputs are kept apart, in memory as in a network: were the next pass's to take their place,
    small ones would be overwritten in the cache before they reach memory.
    """

    def both(i: int) -> object:
        y = candidate.forward(i)
        return y, candidate.backward(y, i, False)

    on_cpu = device.type == "cpu"  # whose replays go through one graph of autograd's again
    _warmed(lambda: both(0), device)
    forward = recorded([lambda i=i: candidate.forward(i) for i in range(sets)], device)
    # in memory of its own: what it frees of the forward pass's stays as it is for the next replay
    backward = recorded(
        [lambda y=y, i=i: candidate.backward(y, i, on_cpu) for i, y in enumerate(forward.outputs)],
        device,
    )
    in_turns = recorded([lambda i=i: both(i) for i in range(sets)], device)

    def laps() -> Iterator[None]:
        for recording in (forward, backward, in_turns):
            recording.replay()
            yield

    return laps


def copied(tensors: list[Tensor], device: torch.device) -> Laps:
    """The ceiling: a copy of each, device to device, without Python."""
    outputs = [torch.empty_like(tensor) for tensor in tensors]
    pairs = list(zip(outputs, tensors, strict=True))
    _warmed(lambda: outputs[0].copy_(tensors[0]), device)
    recording = recorded([lambda to=to, of=of: to.copy_(of) for to, of in pairs], device)

    def laps() -> Iterator[None]:
        recording.replay()
        yield

    return laps


@dataclass(frozen=True)
class Recording:
    """Passes that can be done again, and what they returned; on a GPU, where it will be."""

    replay: Callable[[], object]
    outputs: list[Any]


def recorded(passes: list[Callable[[], object]], device: torch.device) -> Recording:
    """The passes one after the other as one CUDA graph; on the CPU, as they are."""
    if device.type == "cpu":
        return Recording(lambda: [each() for each in passes], [each() for each in passes])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    gc.disable()  # a graph that were destroyed meanwhile would break the capture
    try:
        with torch.cuda.graph(graph):
            outputs = [each() for each in passes]
    finally:
        gc.enable()
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
    return Recording(graph.replay, outputs)


def _warmed(work: Callable[[], object], device: torch.device) -> None:
    """Libraries loaded and kernels compiled, on another stream, as a capture asks for."""
    if device.type == "cpu":
        work()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def rounds_for(seconds: float, one_round: float) -> int:
    """How many rounds take about so long, within bounds."""
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / one_round)))


def measured(
    candidates: dict[str, Laps], seconds: float | None, clock: Clock
) -> dict[str, list[tuple[float, ...]]]:
    """Laps of each candidate in turns, for about so many seconds together; None: one round."""
    if seconds is None:
        return laps_in_turns(candidates, 1, clock, warm_up=0)
    first = laps_in_turns(candidates, 1, clock)
    one_round = sum(sum(laps) for (laps,) in first.values())
    return laps_in_turns(candidates, rounds_for(seconds, one_round), clock, warm_up=1)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; nan where out is not finite."""
    out, reference = out.detach().double(), reference.detach().double()
    return float((out - reference).norm() / reference.norm())


def poison(like: Tensor, times: int = 4) -> None:
    """Leave nan in the memory that the next tensors of this size get.

    An element that a kernel leaves out then shows.
    """
    tensors = [torch.full_like(like, float("nan")) for _ in range(times)]
    del tensors


def release() -> None:
    """Give memory back, CUDA graphs' included, whose references are cyclic."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_for(dry_run: bool) -> torch.device:
    """The GPU; in a dry run the CPU, with the Triton kernels under Triton's interpreter.

    To be called before batchnorm is imported, which reads the switch.
    """
    if dry_run:
        os.environ["BATCHNORM_KERNELS"] = "interpreter"
        os.environ["TRITON_INTERPRET"] = "1"  # for whoever imports Triton first: an optimizer does
        torch.set_num_threads(1)  # small tensors only wait for a second one
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry-run shows that the script works")
    return torch.device("cuda")


def describe(device: torch.device) -> str:
    """What the numbers were measured on: machine, driver and versions."""
    if device.type == "cpu":
        return machine()
    about = torch.cuda.get_device_properties(device)
    return ", ".join(
        [
            about.name,
            f"{about.multi_processor_count} SMs",
            f"{about.total_memory / 2**30:.0f} GiB",
            f"L2 {about.L2_cache_size / 2**20:.0f} MiB",
            f"driver {_driver()}",
            f"CUDA {torch.version.cuda}",
            f"cuDNN {torch.backends.cudnn.version()}",
            f"PyTorch {torch.__version__}",
            f"Triton {_version('triton')}",
        ]
    )


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return "none"


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else "unknown"


def refuse_dry_results(output: Path | None, dry_run: bool) -> None:
    """What a dry run gives must not lie where measurements do."""
    if dry_run and output is not None and RESULTS.resolve() in output.resolve().parents:
        raise SystemExit(f"--dry-run measures nothing: --output must not be in {RESULTS}")


def write(output: Path, text: str, numbers: dict[str, Any]) -> None:
    """The page, and beside it the numbers it is made of, as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, "utf-8")
    told = json.dumps(_rounded(numbers), ensure_ascii=False)
    rows = told.replace('{"shape"', '\n{"shape"')  # a line each
    output.with_suffix(".json").write_text(rows + "\n", "utf-8")


def _rounded(value: Any) -> Any:
    """Five digits, more than were measured."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

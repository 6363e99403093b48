"""The cases of `gpu_layers.py`: shapes, candidates, the check before they are timed, the timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import gpu_timing
import torch
import torch.nn.functional as F
from gpu_goals import DEFAULT, EAGER, NATIVE, OURS, OURS_COMPILED, PARTS, TUNED
from gpu_timing import Candidate
from layers import OPERATIONS, layers, ours, theirs
from timing import ratio_spread, spread
from torch import Tensor, nn

RESNET = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14))
RESNET_50 = (*RESNET, (512, 7), (2048, 7))  # channels, and height and width
SHAPES = [
    *((n, c, s, s) for n in (256, 32) for c, s in RESNET_50),
    *((n, c, s, s) for n in (128, 64) for c, s in ((64, 56), (512, 28), (2048, 7))),
    *((256, 512), (4096, 64), (4096, 1024), (262144, 64)),
    *((64, 128, 400), (256, 512, 1024)),
    *((4, 32, 16, 56, 56), (16, 64, 16, 56, 56)),
]
QUICK = [(256, 64, 112, 112), (256, 256, 56, 56), (32, 64, 56, 56), (32, 512, 7, 7), (4096, 1024)]
TINY = [(4, 8, 6, 6), (6, 16), (2, 4, 9), (2, 3, 2, 4, 4)]  # of a dry run
COMPILED = [
    *((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14)),
    *((32, 64, 56, 56), (32, 512, 7, 7)),
]
"""BN + ReLU in training of these is compiled too: each compilation takes 5 to 20 seconds."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDING = {"bf16": 3e-3, "fp16": 4e-4, "fp32": 1e-5}
"""How far outputs and their gradients may be from float64's, ‖out − ref‖ / ‖ref‖."""
CUT_OFF = 4.0  # times as far where Triton's interpreter cuts bfloat16's digits off, unrounded
SUMMING = 1e-4  # likewise γ's and β's gradients, which are float32's sums in every dtype


@dataclass(frozen=True)
class Case:
    """One tensor, operation and mode. `compiled`: torch.compile's candidates run too."""

    shape: tuple[int, ...]
    layout: str
    dtype: str
    operation: str
    frozen: bool
    compiled: bool = False

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


def cases(
    shapes: list[tuple[int, ...]], dtypes: list[str], layouts: list[str], compiled: bool
) -> list[Case]:
    """The goals' first, for time may run out: those compiled, BN + ReLU in training, the others."""
    found = [
        Case(shape, layout, dtype, operation, frozen)
        for dtype in dtypes
        for shape in shapes
        for layout in (layouts if len(shape) > 3 else ["contiguous"])
        for operation in OPERATIONS
        for frozen in (False, True)
    ]
    if compiled:
        found = [replace(case, compiled=_is_compiled(case)) for case in found]

    def late(case: Case) -> tuple[bool, bool, bool]:
        return not case.compiled, case.frozen, case.operation != "BN+ReLU"

    return sorted(found, key=late)


def _is_compiled(case: Case) -> bool:
    return case.shape in COMPILED and case.operation == "BN+ReLU" and not case.frozen


@dataclass(frozen=True)
class Inputs:
    """What a pass is given: x, the residual of an addition, and the output's gradient."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @classmethod
    def random(cls, case: Case, generator: torch.Generator) -> Inputs:
        """Never zeros: they hide what is left out, and can run faster.

        `generator`: on the device; not the usual one, which a capture that fails leaves unusable.
        """
        x, residual, dy = (_random(case, generator) for _ in range(3))
        has_residual = case.operation == "BN+add+ReLU"
        return cls(
            (1.5 * x + 0.5).requires_grad_(),
            residual.requires_grad_() if has_residual else None,
            dy,
        )


def _random(case: Case, generator: torch.Generator) -> Tensor:
    kind = torch.contiguous_format
    if case.layout == "channels_last":
        kind = torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d
    made = torch.empty(
        case.shape, device=generator.device, dtype=DTYPES[case.dtype], memory_format=kind
    )
    return made.normal_(generator=generator)


Operation = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


class Fused(nn.Module):
    """An operation as a module, for torch.compile."""

    def __init__(self, layer: nn.Module, operation: Operation) -> None:
        super().__init__()
        self.layer, self.operation = layer, operation

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.operation(self.layer, x, residual)


class WithoutCudnn(Fused):
    """With PyTorch's own kernels; the backward pass takes what the forward pass took."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(x, residual)


def pair(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours, with the same γ, β and running statistics, none of them usual."""
    their_layer, our_layer = layers(case.shape, case.operation, case.frozen)
    with torch.no_grad():
        their_layer.weight.uniform_(0.5, 1.5)
        their_layer.bias.normal_()
        their_layer.running_mean.normal_()
        their_layer.running_var.uniform_(0.5, 2.5)
    our_layer.load_state_dict(their_layer.state_dict())
    return their_layer.to(device), our_layer.to(device)


def candidate(
    module: nn.Module, sets: list[Inputs], compiled: dict[str, Any] | None = None
) -> Candidate:
    """Gradients of everything that learns in a network are asked for, and returned, not added.

    `compiled`: torch.compile's arguments.
    """
    pass_ = module if compiled is None else torch.compile(module, **compiled)

    def forward(i: int) -> Tensor:
        return pass_(sets[i].x, sets[i].residual)

    def backward(y: Tensor, i: int, keep: bool) -> object:
        inputs = [t for t in (sets[i].x, sets[i].residual, *module.parameters()) if t is not None]
        return torch.autograd.grad(y, inputs, sets[i].dy, retain_graph=keep)

    return Candidate(forward, backward)


def candidates(case: Case, sets: list[Inputs], device: torch.device) -> dict[str, Candidate]:
    """Everybody's, each with a layer of its own, whose buffers only it writes.

    torch.compile's are without its own CUDA graphs, which copy each input to a place of their own,
    one more pass than needed. Here everybody's passes are replayed from a graph that reads the
    inputs where they are.
    """
    their_layer, our_layer = pair(case, device)

    def their_pass(kind: type[Fused] = Fused) -> Fused:
        return kind(deepcopy(their_layer), theirs(case.operation))

    def our_pass() -> Fused:
        return Fused(deepcopy(our_layer), ours(case.operation))

    found = {EAGER: candidate(their_pass(), sets), OURS: candidate(our_pass(), sets)}
    if backend_of_torch(their_layer, sets[0].x) == "Cudnn":  # else eager is native already
        found[NATIVE] = candidate(their_pass(WithoutCudnn), sets)
    if case.compiled:
        whole = {"dynamic": False, "fullgraph": True}
        tuned = {"mode": "max-autotune-no-cudagraphs", **whole}
        found[DEFAULT] = candidate(their_pass(), sets, whole)
        found[TUNED] = candidate(their_pass(), sets, tuned)
        found[OURS_COMPILED] = candidate(our_pass(), sets, whole)
    return found


def backend_of_torch(layer: nn.Module, x: Tensor) -> str:
    """Which of its kernels PyTorch takes with cuDNN on, by its own word: "Cudnn" or "Native"."""
    held = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    chosen = torch._C._select_batch_norm_backend(x, *held, layer.training, layer.eps)
    return str(chosen).rsplit(".", 1)[-1]


def errors(case: Case, layer: nn.Module, inputs: Inputs) -> dict[str, float]:
    """How far ours is from torch in float64 on these inputs; in memory that held nan before."""
    held = [b.detach().clone() for b in (layer.running_mean, layer.running_var)]
    wide = [None if t is None else t.detach().double() for t in (inputs.x, inputs.residual)]
    wide += [parameter.detach().double() for parameter in (layer.weight, layer.bias)]
    leaves = [None if t is None else t.requires_grad_() for t in wide]
    x, residual, weight, bias = leaves
    mean, var = (b.double() for b in held)
    with torch.backends.cudnn.flags(enabled=False):  # PyTorch's own sums in float64
        z = F.batch_norm(x, mean, var, weight, bias, not case.frozen, 0.1, layer.eps)
    z = z if residual is None else z + residual
    reference = z if case.operation == "BN" else F.relu(z)
    learn = [t for t in leaves if t is not None]
    wanted = [reference, *torch.autograd.grad(reference, learn, inputs.dy.double())]

    gpu_timing.poison(inputs.x)
    one = candidate(Fused(layer, ours(case.operation)), [inputs])
    y = one.forward(0)
    got = [y, *one.backward(y, 0, False)]  # type: ignore[misc]
    names = ["y", "dx", *(["d residual"] if residual is not None else []), "dγ", "dβ"]
    found = {
        name: gpu_timing.relative_error(out, ref)
        for name, out, ref in zip(names, got, wanted, strict=True)
    }
    if not case.frozen:
        tracked = torch.cat([layer.running_mean, layer.running_var])
        found["running statistics"] = gpu_timing.relative_error(tracked, torch.cat([mean, var]))
    with torch.no_grad():
        layer.running_mean.copy_(held[0])
        layer.running_var.copy_(held[1])
    return found


def are_wrong(found: dict[str, float], dtype: str, slack: float = 1.0) -> list[str]:
    """Those beyond what rounding makes of a right result; nan is beyond everything."""
    rounded = ("y", "dx", "d residual")
    return [
        name
        for name, error in found.items()
        if not error <= (slack * ROUNDING[dtype] if name in rounded else SUMMING)
    ]


def named(case: Case) -> dict[str, Any]:
    """What a row is of."""
    return {
        "shape": "×".join(map(str, case.shape)),
        "layout": case.layout,
        "dtype": case.dtype,
        "operation": case.operation,
        "frozen": case.frozen,
        "bytes": case.bytes,
    }


def measure(case: Case, device: torch.device, seconds: float | None) -> dict[str, Any]:
    """A case's row of plain numbers; without times where ours is wrong.

    A candidate that fails is left out, and one whose passes cannot be captured has no time on the
    device; under "left out" stands why.
    """
    cache = gpu_timing.cache_of(device)
    touched = 2 * case.bytes  # x and y, or dy and dx
    count = gpu_timing.sets_needed(touched, cache)
    generator = torch.Generator(device).manual_seed(0)
    sets = [Inputs.random(case, generator) for _ in range(count)]
    their_layer, our_layer = pair(case, device)
    row: dict[str, Any] = {
        **named(case),
        "large": case.bytes >= cache,
        "sets": count,
        "past cache": gpu_timing.is_past_cache(touched, cache),
        "torch takes": backend_of_torch(their_layer, sets[0].x),
        "errors": errors(case, our_layer, sets[0]),
    }
    slack = CUT_OFF if device.type == "cpu" else 1.0
    row["wrong"] = are_wrong(row["errors"], case.dtype, slack)
    if row["wrong"]:
        return row
    everybody = candidates(case, sets, device)
    row["left out"] = left_out = {}
    for name, each in list(everybody.items()):
        try:
            each.backward(each.forward(0), 0, False)
        except Exception as error:  # a compiler may raise anything
            left_out[name] = _reason(error)
            del everybody[name]
    # before anything is captured, whose graphs of autograd's would tie the inputs to its stream;
    # native's switch costs time on the host that nobody pays who has no cuDNN
    calls = {n: gpu_timing.called(c, count) for n, c in everybody.items() if n != NATIVE}
    times = gpu_timing.measured(calls, seconds, gpu_timing.clock_of(device))
    row["as called"] = _told(times, lambda t: dict(zip(PARTS, (*t, sum(t)), strict=True)))
    laps = {"copy": gpu_timing.copied([inputs.x.detach() for inputs in sets], device)}
    for name, each in everybody.items():
        try:
            laps[name] = gpu_timing.replayed(each, count, device)
        except RuntimeError as error:
            left_out[f"{name}, on the device"] = _reason(error)
    times = gpu_timing.measured(laps, seconds, gpu_timing.clock_of(device, lead=True))
    row["copy"] = spread([t / count for (t,) in times.pop("copy")])
    row["on the device"] = _told(times, lambda t: {p: t[i] / count for i, p in enumerate(PARTS)})
    return row


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _told(
    times: dict[str, list[tuple[float, ...]]], parts: Callable[[tuple[float, ...]], dict]
) -> dict[str, dict[str, dict[str, tuple[float, ...]]]]:
    """Seconds of each candidate's parts, and how many times ours they are, round by round."""
    rounds = {name: [parts(t) for t in laps] for name, laps in times.items()}

    def of(name: str, part: str) -> list[float]:
        return [t[part] for t in rounds[name]]

    return {
        "seconds": {n: {p: spread(of(n, p)) for p in PARTS} for n in rounds},
        "over ours": {
            n: {p: ratio_spread(of(n, p), of(OURS, p)) for p in PARTS}
            for n in rounds
            if n != OURS and OURS in rounds
        },
    }


def rows_of(
    todo: list[Case], device: torch.device, seconds: float | None
) -> Iterator[dict[str, Any]]:
    """Row by row; memory and compiled code of a case go before the next."""
    for case in todo:
        torch.manual_seed(0)  # of parameters, on the CPU
        try:
            row = measure(case, device, seconds)
        except Exception as error:  # one's failure, a compiler's say, must not cost the others
            row = {**named(case), "failed": _reason(error)}
        yield row
        if case.compiled:
            torch._dynamo.reset()  # or it would compile only the first eight shapes
        gpu_timing.release()

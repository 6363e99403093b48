"""`batchnorm plan`: over how many ranks to synchronize, and what processes need for it."""

from __future__ import annotations

import dataclasses
import json
import os
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn

from batchnorm.audit.gathering import LIMIT
from batchnorm.audit.rules.bn110_noisy_statistics import LARGEST
from batchnorm.cli.model import in_one_line, input_like, load_batches, load_module, shape_of
from batchnorm.cli.output import check_output, refuse
from batchnorm.models.calling import call
from batchnorm.planning import INFINIBAND, LOOPBACK, Network, Plan, measure_network
from batchnorm.planning import plan as planned
from batchnorm.report.files import write_atomically
from batchnorm.report.json import finite

__all__ = ["plan"]

NETWORKS = {"gloo": LOOPBACK, "nccl": INFINIBAND}


class Backend(str, Enum):
    """What the collectives run on."""

    GLOO = "gloo"
    NCCL = "nccl"


def plan(
    target: Annotated[
        str | None,
        typer.Argument(
            help="What makes the model: package.module:make_model or file.py:make_model."
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="How many ranks train.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples of each in a pass.")] = None,
    input: Annotated[
        str | None,
        typer.Option("--input", help="The shape of a batch, such as 4,3,224,224: bounds by it."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Batches, package.module:loader: measure the noise on them."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What the collectives run on.")] = Backend.GLOO,
    latency: Annotated[float | None, typer.Option(help="Microseconds a collective.")] = None,
    message: Annotated[float | None, typer.Option(help="Microseconds a message in it.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of a rank.")] = None,
    max_noise: Annotated[
        float, typer.Option(help="What is allowed, in standard deviations; BN110's by default.")
    ] = LARGEST,
    step_time: Annotated[
        float | None, typer.Option(help="Milliseconds of a step now, to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the numbers here, a .json.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the network between torchrun's processes instead."),
    ] = False,
) -> None:
    """Say whether to synchronize batch norm, over how many ranks, at what cost and gain.

    Without --input and --data a sample counts as one independent value per channel, the worst
    case. The times are of a model of the network; its numbers come from this library's own
    measurement (gloo) or from NCCL's estimates, unless yours are given:

    torchrun --nproc-per-node 8 -m batchnorm plan --measure
    """
    if measure:
        if target is not None or ranks is not None or data is not None or input is not None:
            refuse("--measure stands alone, with --backend; plan with its numbers afterwards")
        _measure(backend)
        return
    if target is None or ranks is None or batch is None:
        refuse("plan what? batchnorm plan --ranks 1024 --batch 4 package.module:make_model")
    if input is not None and data is not None:
        refuse("--data shows what --input does, and the noise; give one of them")
    if output is not None:
        if output.suffix != ".json":
            refuse(f"{output.name} names no form of plan; its name ends in .json")
        check_output(output, Path(target))
    try:
        network = _network(backend, latency, message, bandwidth)
        model = load_module(target)
        given: dict[str, Any] = {"call": _named(data or f"one tensor of shape {input}")}
        if input is not None:
            given["example"] = input_like(model, shape_of(input))
        if data is not None:
            given["batches"] = _batches(data)
        result = planned(
            model,
            ranks=ranks,
            batch=batch,
            network=network,
            max_noise=max_noise,
            step=None if step_time is None else step_time / 1e3,
            **given,
        )
    except ValueError as error:
        refuse(str(error))
    typer.echo(f"{target}\n\n{result!r}")
    if output is not None:
        try:
            write_atomically(output, _json(result))
        except OSError as error:
            refuse(f"cannot write {output}: {error.strerror}")


def _measure(backend: Backend) -> None:
    if "RANK" not in os.environ:
        refuse(
            "--measure needs several processes: torchrun --nproc-per-node 8 -m batchnorm plan "
            "--measure"
        )
    if backend is Backend.NCCL:
        if not torch.cuda.is_available():
            refuse("--backend nccl needs GPUs, and PyTorch sees none here")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend.value)
    try:
        network = measure_network()
        if dist.get_rank() == 0:
            typer.echo(f"{network.name}. To plan with it:")
            latency, message = (f"{s * 1e6:.4g}" for s in (network.collective, network.message))
            typer.echo(
                f"batchnorm plan --backend {backend.value} --latency {latency} "
                f"--message {message} --bandwidth {network.bandwidth / 1e9:.3g}"
            )
    except ValueError as error:
        if dist.get_rank() == 0:
            refuse(str(error))
        raise typer.Exit(0) from error
    finally:
        dist.destroy_process_group()


def _network(
    backend: Backend, latency: float | None, message: float | None, bandwidth: float | None
) -> Network:
    """The one that is known, with the numbers that were given."""
    known = NETWORKS[backend.value]
    given = {"--latency": latency, "--message": message, "--bandwidth": bandwidth}
    named = [option for option, value in given.items() if value is not None]
    if not named:
        return known
    for option, value in given.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{option} is a number from 0 up, got {value:g}")
    if bandwidth == 0:
        raise ValueError("--bandwidth is above 0 GB/s, or inf")
    rest = "" if len(named) == 3 else f", the rest of {known.name}"
    return Network(
        f"a network of {', '.join(named)} as given{rest}",
        backend.value,
        known.collective if latency is None else latency / 1e6,
        known.message if message is None else message / 1e6,
        known.byte if bandwidth is None else 1 / bandwidth / 1e9,
    )


def _named(what: str) -> Any:
    """How to call the model, with errors of its own said in one line."""

    def forward(model: nn.Module, batch: Any) -> Any:
        try:
            return call(model, batch)
        except (Exception, SystemExit) as error:
            raise ValueError(f"the model failed on {what}: {in_one_line(error)}") from error

    return forward


def _batches(data: str) -> list[object]:
    batches = load_batches(data)
    try:
        return list(islice(batches, LIMIT))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{data} failed: {in_one_line(error)}") from error


def _json(result: Plan) -> str:
    """`{"version": 1, "ranks", …, "choices": […], "best": the size of the group or null}`."""
    best = None if result.best is None else result.best.group
    fields = finite({"version": 1, **dataclasses.asdict(result), "best": best})
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"

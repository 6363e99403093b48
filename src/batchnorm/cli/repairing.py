"""The repairs that make sense of a checkpoint: a model, its weights, and where the result goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from batchnorm import repair
from batchnorm.cli.model import in_one_line, input_like, load_batches, load_module, shape_of
from batchnorm.cli.output import refuse
from batchnorm.cli.weights import (
    WRITTEN,
    checked_destination,
    load_weights,
    read_arrays,
    save_tensors,
    tensors_of,
)
from batchnorm.report.files import replacing

__all__ = ["add_commands"]

EXPORTED = ".pt2"

Target = Annotated[
    str,
    typer.Argument(help="What makes the model: package.module:make_model or file.py:make_model."),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="A checkpoint to load into it first.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help=f"Where the result goes: {', '.join(WRITTEN)}."),
]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Write over the checkpoint of --weights.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Batches: package.module:loader, or a function making one."),
]
Input = Annotated[
    str | None, typer.Option("--input", help="The shape of an input, such as 1,3,224,224.")
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="Only layers whose paths match, such as 'stem.*'. Repeatable."),
]


class Upstream(str, Enum):
    """What a layer's input is normalized with on its way; see `recalibrate`."""

    BATCH = "batch"
    RUNNING = "running"


class Source(str, Enum):
    """Where weights come from; see `port`."""

    KERAS = "keras"
    FLAX = "flax"
    TORCH = "torch"


def add_commands(app: typer.Typer) -> None:
    """Add the repairs to the command line."""
    for command in (recalibrate, fold, convert, average, port):
        app.command()(command)


def recalibrate(
    target: Target,
    data: Annotated[
        str, typer.Option("--data", help="Batches: package.module:loader, or what makes one.")
    ],
    weights: Weights = None,
    output: Output = None,
    in_place: InPlace = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many samples; by default use all.")
    ] = None,
    upstream: Annotated[
        Upstream,
        typer.Option(
            help="What earlier layers normalize with meanwhile: as in training, or as "
            "at inference, which takes a pass for each layer."
        ),
    ] = Upstream.BATCH,
    where: Where = None,
) -> None:
    """Give a model the statistics of these batches, pooled exactly.

    Writes the state dict, and says by how much each layer's statistics were off.
    """
    with _refused():
        destination = _destination(weights, output, in_place)
        model = _model(target, weights, in_place)
        batches = load_batches(data)
        with _told(f"failed on the batches of {data}"):
            result = repair.recalibrate(
                model, batches, samples=samples, upstream=upstream.value, where=where
            )
        save_tensors(tensors_of(model), destination)
    _say(result, destination)


def fold(
    target: Target,
    weights: Weights = None,
    data: Data = None,
    input: Input = None,
    output: Output = None,
    in_place: InPlace = False,
    where: Where = None,
) -> None:
    """Let batch norms vanish into the convolutions and linear layers around them.

    Compares outputs before and after on the first batch of --data, or on noise of the shape
    --input. Writes the weights of the folded model, which only a model that was folded likewise
    loads; or, to a .pt2, a program that runs without its code (torch.export), for batches of any
    size where the example has two samples or more.
    """
    with _refused():
        destination = _destination(weights, output, in_place, (*WRITTEN, EXPORTED))
        model = _model(target, weights, in_place).eval()
        example = _example(model, data, input)
        with _told("failed on the example"):
            result = repair.fold(model, example, where=where)
        if destination.suffix == EXPORTED:
            with _told("torch.export cannot export the folded model"):
                _export(model, example, destination)
            _say(result, destination, "a program that torch.export.load reads")
        else:
            save_tensors(tensors_of(model), destination)
            _say(result, destination, "weights for a model that was folded likewise")


def convert(
    target: Target,
    to: Annotated[
        str, typer.Option(help="batchnorm, torch, sync, group_norm, drop_bias and others.")
    ],
    weights: Weights = None,
    data: Data = None,
    input: Input = None,
    output: Output = None,
    in_place: InPlace = False,
    where: Where = None,
) -> None:
    """Put other normalizations in the place of batch norms, or drop the biases that they cancel.

    Writes the converted model's state dict. --data or --input give an example, on which outputs
    before and after are compared.
    """
    with _refused():
        destination = _destination(weights, output, in_place)
        model = _model(target, weights, in_place)
        given = data is not None or input is not None
        example = _example(model, data, input) if given else None
        with _told("failed on the example"):
            result = repair.convert(model, to=to, where=where, example=example)
        save_tensors(tensors_of(model), destination)
    _say(result, destination, "weights for a model that was converted likewise")


def average(
    target: Target,
    checkpoints: Annotated[list[Path], typer.Argument(help="The checkpoints to average.")],
    counts: Annotated[
        str | None,
        typer.Option(help="How much data each has seen, such as 5000,800; by default all alike."),
    ] = None,
    data: Data = None,
    output: Output = None,
) -> None:
    """Average checkpoints: the weights as numbers, the statistics merged as moments.

    With --data the averaged model's statistics are estimated again instead.
    """
    with _refused():
        destination = checked_destination(output, checkpoints)
        models = [_model(target, path) for path in checkpoints]
        model = models[0]
        batches = None if data is None else load_batches(data)
        with _told(f"failed on the batches of {data}"):
            result = repair.average(model, models, counts=_numbers(counts), batches=batches)
        save_tensors(tensors_of(model), destination)
    _say(result, destination)


def port(
    weights: Annotated[Path, typer.Argument(help="Arrays by name: .npz, .safetensors, .pt.")],
    source: Annotated[Source, typer.Option(help="The framework that they come from.")],
    model: Annotated[
        str | None, typer.Option("--model", help="What makes the model that they are for.")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="ε of its batch norms there, if not the default.")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Their momentum there, if not the default.")
    ] = None,
    by_order: Annotated[
        bool,
        typer.Option(
            "--by-order", help="Match layers by their order (of .npz and .pt), not by name."
        ),
    ] = False,
    output: Output = None,
) -> None:
    """Give weights of another framework torch.nn's names, layouts and conventions.

    Says which ε and momentum their batch norms have in PyTorch's sense; a state dict has neither.
    """
    with _refused():
        destination = checked_destination(output, [weights])
        into = None if model is None else load_module(model)
        result = repair.port(
            read_arrays(weights),
            source.value,
            model=into,
            by_order=by_order,
            eps=eps,
            momentum=momentum,
        )
        save_tensors(result.state_dict, destination)
    _say(result, destination)


def _numbers(text: str | None) -> list[float] | None:
    """`5000,800` as numbers; raises `ValueError` for anything else."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r} are no numbers; write them as 5000,800") from error


@contextmanager
def _refused() -> Iterator[None]:
    """Bad input in one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot write: {error.strerror or error}")


@contextmanager
def _told(failure: str) -> Iterator[None]:
    """What somebody else's code raises, as bad input; the repairs' own errors say it themselves."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if _is_own(error):
            raise ValueError(str(error)) from error
        raise ValueError(f"{failure}: {in_one_line(error)}") from error


def _is_own(error: BaseException) -> bool:
    """Whether a function of the repairs raised it, and none that they called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("batchnorm.")


def _destination(
    weights: Path | None,
    output: Path | None,
    in_place: bool,
    forms: tuple[str, ...] = WRITTEN,
) -> Path:
    sources = [] if weights is None else [weights]
    return checked_destination(output, sources, in_place=in_place, forms=forms)


def _model(target: str, weights: Path | None, in_place: bool = False) -> nn.Module:
    model = load_module(target)
    if weights is not None and not load_weights(model, weights) and in_place:
        raise ValueError(
            f"{weights} holds more than the model's tensors, an optimizer perhaps, which would be "
            "lost; give -o for the state dict alone"
        )
    tensors_of(model)  # what could not be written is refused before it is computed
    return model


def _example(model: nn.Module, data: str | None, shape: str | None) -> Any:
    """The first batch, or noise."""
    if (data is None) == (shape is None):
        raise ValueError("give an example: either --data or --input, such as --input 1,3,224,224")
    if shape is not None:
        return input_like(model, shape_of(shape))
    assert data is not None
    for batch in islice(load_batches(data), 1):
        return batch
    raise ValueError(f"{data} has no batches")


def _export(model: nn.Module, example: Any, destination: Path) -> None:
    by_name = dict(example) if isinstance(example, Mapping) else {}
    first = example[0] if isinstance(example, (tuple, list)) else example
    given = () if by_name else (first,)
    # a size of 1 is never taken for any size
    shapes = tree_map(lambda each: {0: Dim.AUTO} if each.ndim else {}, by_name or given)
    exported = torch.export.export(model, given, kwargs=by_name, dynamic_shapes=shapes)
    with replacing(destination) as temporary:
        torch.export.save(exported, temporary)


def _say(result: object, destination: Path, what: str = "") -> None:
    typer.echo(repr(result))
    typer.echo(f"written to {destination}" + (f": {what}" if what else ""))

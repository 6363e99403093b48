"""`batchnorm check`: checkpoints, exported graphs and models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from batchnorm.audit import (
    Graph,
    NoBatchesError,
    Report,
    Selection,
    State,
    audit,
    checkpoints_at,
    label_loss,
    read_checkpoint,
    read_onnx,
    state_of,
)
from batchnorm.audit import check as examine
from batchnorm.cli.model import (
    in_one_line,
    input_like,
    load_batches,
    load_model,
    load_module,
    names_model,
    shape_of,
)
from batchnorm.cli.options import (
    Form,
    FormOption,
    IgnoreOption,
    OutputOption,
    SelectOption,
    SeverityOption,
    StrictOption,
)
from batchnorm.cli.output import check_output, print_in_form, refuse, write_report
from batchnorm.cli.settings import selection_from
from batchnorm.repair import activation_memory

__all__ = ["check"]


def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an ONNX file, a directory of them, or what makes a model: "
            "package.module:make_model or path/to/file.py:make_model."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Batches for the model: package.module:loader, or a function making one."
        ),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Batches are (input, label): look at the loss too.")
    ] = False,
    deploy: Annotated[
        str | None, typer.Option("--deploy", help="Batches as the model is given where it is used.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="What the weights came from: another target.")
    ] = None,
    output: OutputOption = None,
    strict: StrictOption = False,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    severity: SeverityOption = None,
    form: FormOption = Form.TEXT,
    memory: Annotated[
        bool, typer.Option("--memory", help="Say what `rematerialize` would save of a model.")
    ] = False,
    input: Annotated[
        str | None, typer.Option("--input", help="With --memory: a batch, such as 32,3,224,224.")
    ] = None,
) -> None:
    """Check a checkpoint, an exported graph or a model.

    A checkpoint is read without running anything of it. With --data, up to 32 batches are run
    through the model, in training mode and without gradients; with --labels, which says that
    batches are (input, label), some of them backward too, and all in eval mode. With --memory,
    run one forward pass of it in training mode on noise, add up what it keeps for the backward
    pass, and say how much of that `batchnorm.rematerialize(model)` would save.
    """
    if memory != (input is not None):
        refuse("--memory and --input go together: --memory --input 32,3,224,224")
    if memory and any((data, labels, deploy, reference, output, strict, select, ignore, severity)):
        refuse("--memory stands alone, with --input; audit the model in a command of its own")
    if data is None and (labels or deploy is not None):
        refuse("--labels and --deploy need --data, the batches that the model is trained with")
    if output is not None:
        check_output(output, Path(target))
    try:
        if input is not None:
            _print_memory(target, shape_of(input))
            return
        selection = selection_from(select, ignore, severity)
        report = _checked(target, data, labels, deploy, reference, selection)
    except ValueError as error:
        refuse(str(error))
    print_in_form(report, form, Console())
    if output is not None:
        try:
            write_report(report, output)
        except OSError as error:
            refuse(f"cannot write {output}: {error.strerror}")
    if strict and not report.is_clean:
        raise typer.Exit(1)


def _checked(
    target: str,
    data: str | None,
    labels: bool,
    deploy: str | None,
    reference: str | None,
    selection: Selection,
) -> Report:
    beside = None if reference is None else _reference(reference)
    if names_model(target):
        model = load_model(target)
        batches = None if data is None else load_batches(data)
        deployed = None if deploy is None else load_batches(deploy)
        try:
            return audit(
                model,
                batches,
                loss=label_loss if labels else None,
                deploy=deployed,
                reference=beside,
                selection=selection,
                name=target,
            )
        except NoBatchesError:
            raise
        except (Exception, SystemExit) as error:
            said = in_one_line(error)
            raise ValueError(f"the model failed on a batch of {data}: {said}") from error
    if data is not None:
        raise ValueError("--data needs a model, package.module:make_model; a file cannot run")
    states, graphs = [], []
    for path in checkpoints_at(Path(target)):
        state, graph = _read(path)
        states.append(state)
        graphs.extend([] if graph is None else [graph])
    return examine(states, reference=beside, graphs=graphs, selection=selection)


def _read(path: Path) -> tuple[State, Graph | None]:
    return read_onnx(path) if path.suffix == ".onnx" else (read_checkpoint(path), None)


def _reference(target: str) -> State:
    """The layers of what is compared with: a file's or a model's."""
    if not names_model(target):
        return _read(Path(target))[0]
    return state_of(load_module(target), target)


def _print_memory(target: str, shape: tuple[int, ...]) -> None:
    model = load_module(target)
    try:
        kept = activation_memory(model, input_like(model, shape))
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the model's forward pass failed on one tensor of shape {shape}: {in_one_line(error)}"
        ) from error
    table = Table("kept for the backward pass", Column("size", justify="right"), "saved", box=None)
    table.add_row("as it is", decimal(kept.kept))
    ways = {"after rematerialize(model)": kept.rematerialized}
    if kept.converted != kept.rematerialized:
        ways["and with this library's layers for torch.nn's"] = kept.converted
    for way, size in ways.items():
        table.add_row(way, decimal(size), f"{1 - size / kept.kept:.0%}" if kept.kept else "")
    console = Console(soft_wrap=True)
    console.print(f"{target}, {'×'.join(map(str, shape))}, training", highlight=False)
    console.print(table)

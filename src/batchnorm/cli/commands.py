"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markdown import Markdown
from rich.table import Column, Table

from batchnorm.audit import (
    RULES,
    Report,
    audit,
    checkpoints_at,
    find_rule,
    read_checkpoint,
    run_script,
)
from batchnorm.audit import check as examine
from batchnorm.audit.place import displayed
from batchnorm.cli.files import example, write_atomically
from batchnorm.cli.model import (
    in_one_line,
    input_like,
    load_batches,
    load_model,
    names_model,
    shape_of,
)
from batchnorm.kernels.diagnosis import diagnose
from batchnorm.repair import activation_memory
from batchnorm.report import print_report, to_json

__all__ = ["app"]

BAD_INPUT = 2

_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the findings here as JSON.")
]
_Strict = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 where there are warnings or errors.")
]

app = typer.Typer(
    help="Batch normalization, watched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A training script; it runs unchanged.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own.")] = None,
    output: _Output = None,
    strict: _Strict = False,
) -> None:
    """Run a training script and report what its batch norm layers did.

    The script's output, exceptions and exit status stay its own; the report goes to standard
    error when it has ended. Options stand before SCRIPT; what follows it belongs to the script.
    """
    if script.is_dir():
        _refuse(f"{script} is a directory; give the path of a Python file")
    if not script.is_file():
        _refuse(f"no script at {script}; give the path of a Python file")
    if output is not None:
        output = output.resolve()  # the script may change the directory
        _check_output(output, script)
    sys.excepthook = sys.__excepthook__  # typer's own is not what the script would have
    try:
        status, report = run_script(script, arguments or [])
    except OSError as error:
        _refuse(f"cannot read {script}: {error.strerror}")
    with contextlib.suppress(AttributeError, OSError, ValueError):  # the script may have closed it
        sys.stdout.flush()
    print_report(report, Console(file=sys.__stderr__))
    if output is not None:
        try:
            write_atomically(output, to_json(report))
        except OSError as error:
            _complain(f"cannot write {output}: {error.strerror}")
            status = status or BAD_INPUT
    if strict and status == 0 and not report.is_clean:
        status = 1
    raise typer.Exit(status)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a directory of them, or what makes a model: "
            "package.module:make_model or path/to/file.py:make_model."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Batches for the model: package.module:loader, or a function making one."
        ),
    ] = None,
    output: _Output = None,
    strict: _Strict = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Say what `rematerialize` would save of a model.")
    ] = False,
    input: Annotated[
        str | None, typer.Option("--input", help="With --memory: a batch, such as 32,3,224,224.")
    ] = None,
) -> None:
    """Check a checkpoint or a model.

    A checkpoint is read without running anything of it. With --data, up to 32 batches are run
    through the model, in training mode and without gradients. With --memory, run one forward
    pass of it in training mode on noise, add up what it keeps for the backward pass, and say how
    much of that `batchnorm.rematerialize(model)` would save.
    """
    if memory != (input is not None):
        _refuse("--memory and --input go together: --memory --input 32,3,224,224")
    if output is not None:
        _check_output(output, Path(target))
    try:
        if input is not None:
            _print_memory(target, shape_of(input))
            return
        report = _checked(target, data)
    except ValueError as error:
        _refuse(str(error))
    print_report(report, Console())
    if output is not None:
        try:
            write_atomically(output, to_json(report))
        except OSError as error:
            _refuse(f"cannot write {output}: {error.strerror}")
    if strict and not report.is_clean:
        raise typer.Exit(1)


def _checked(target: str, data: str | None) -> Report:
    if names_model(target):
        model = load_model(target)
        batches = None if data is None else load_batches(data)
        try:
            return audit(model, batches, name=target)
        except (Exception, SystemExit) as error:
            said = in_one_line(error)
            raise ValueError(f"the model failed on a batch of {data}: {said}") from error
    if data is not None:
        raise ValueError("--data needs a model, package.module:make_model; a checkpoint cannot run")
    return examine([read_checkpoint(path) for path in checkpoints_at(Path(target))])


def _print_memory(target: str, shape: tuple[int, ...]) -> None:
    model = load_model(target)
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


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 12,
) -> None:
    """Train a residual network on handwritten digits, watched; then with the classic mistake."""
    if find_spec("sklearn") is None:
        _refuse("the demo needs scikit-learn's digits; pip install 'batchnorm[lab]'")
    script = example("digits.py")
    console = Console()
    for mistake in ([], ["--forget-eval"]):
        words = ["run", displayed(script), "--epochs", str(epochs), *mistake]
        console.rule(f"batchnorm {' '.join(words)}", align="left")
        # each in a process of its own, as somebody would type it
        command = [sys.executable, "-m", "batchnorm", *words]
        status = subprocess.run(command, check=False).returncode  # noqa: S603 - our own words
        console.print()
        if status != 0:
            raise typer.Exit(status)


@app.command()
def rules(
    code: Annotated[str | None, typer.Argument(help="A rule, such as BN108.")] = None,
) -> None:
    """List the rules, or show one rule's page."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # pages have an ε where a terminal may have none
    console = Console()
    if code is not None:
        try:
            page = find_rule(code).page()
        except KeyError as error:
            _refuse(error.args[0])
        console.print(Markdown(page))
        return
    table = Table("code", "finds", "looks at", box=None)
    for rule in RULES:
        table.add_row(rule.code, rule.name, rule.looks_at)
    console.print(table)


@app.command()
def doctor() -> None:
    """Say which kernels run the layers on this machine, and why."""
    facts = diagnose()
    width = max(len(fact.about) for fact in facts)
    for fact in facts:  # no table, which would cut a path at the terminal's edge
        typer.echo(f"{fact.about:{width}}  {fact.finding}")


def _check_output(output: Path, script: Path) -> None:
    """Refuse what cannot be written, or must not, before hours of training and not after them."""
    if not output.parent.is_dir():
        _refuse(f"no directory {output.parent} to write {output.name} into; create it first")
    if output.exists() and not output.is_file():
        _refuse(f"{output} is no regular file; give the path of one, or of none yet")
    if output == script.resolve():
        _refuse(f"{output} is the script itself; give another path to write to")
    if not os.access(output.parent, os.W_OK):
        _refuse(f"may not write into {output.parent}; give another path")


def _complain(reason: str) -> None:
    typer.echo(f"batchnorm: {reason}", err=True)


def _refuse(reason: str) -> NoReturn:
    """One clear line, and the exit status of bad input."""
    _complain(reason)
    raise typer.Exit(BAD_INPUT)

"""The command line: parse, call, print."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from batchnorm.audit import RULES, find_rule
from batchnorm.audit.place import displayed
from batchnorm.cli.checking import check
from batchnorm.cli.examples import example
from batchnorm.cli.laboratory import lab
from batchnorm.cli.options import (
    Form,
    FormOption,
    IgnoreOption,
    OutputOption,
    SelectOption,
    SeverityOption,
    StrictOption,
    WaitOption,
)
from batchnorm.cli.output import check_output, refuse
from batchnorm.cli.planning import plan
from batchnorm.cli.repairing import add_commands
from batchnorm.cli.running import Telling, run_on_ranks
from batchnorm.cli.settings import selection_from
from batchnorm.kernels.diagnosis import diagnose

__all__ = ["app"]

app = typer.Typer(
    help="Batch normalization, watched and repaired.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A training script; it runs unchanged.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own.")] = None,
    output: OutputOption = None,
    strict: StrictOption = False,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    severity: SeverityOption = None,
    form: FormOption = Form.TEXT,
    wait: WaitOption = 60.0,
) -> None:
    """Run a training script and report what its batch norm layers did.

    The script's output, exceptions and exit status stay its own; the report goes to standard
    error when it has ended. Options stand before SCRIPT; what follows it belongs to the script.
    Several processes, `torchrun --nproc-per-node 8 -m batchnorm run train.py`, report once: rank 0
    waits for the others, tells what they found, and which of them did not come.
    """
    if script.is_dir():
        refuse(f"{script} is a directory; give the path of a Python file")
    if not script.is_file():
        refuse(f"no script at {script}; give the path of a Python file")
    if output is not None:
        output = output.resolve()  # the script may change the directory
        check_output(output, script)
    try:
        selection = selection_from(select, ignore, severity)
    except ValueError as error:
        refuse(str(error))
    sys.excepthook = sys.__excepthook__  # typer's own is not what the script would have
    telling = Telling(output, form, strict)
    try:
        status = run_on_ranks(script, arguments or [], selection, telling, wait)
    except OSError as error:
        refuse(f"cannot read {script}: {error.strerror}")
    raise typer.Exit(status)


app.command()(check)
app.command()(plan)
add_commands(app)
app.add_typer(lab, name="lab")


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 12,
) -> None:
    """Train a residual network on handwritten digits, watched; then with the classic mistake."""
    if find_spec("sklearn") is None:
        refuse("the demo needs scikit-learn's digits; pip install 'batchnorm[lab]'")
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
            refuse(error.args[0])
        console.print(Markdown(page))
        return
    table = Table("code", "finds", "looks at", box=None)
    for rule in RULES:
        table.add_row(rule.code, rule.name, rule.looks_at)
    console.print(table)


@app.command()
def doctor() -> None:
    """Say which kernels run the layers on this machine, and why."""
    try:
        facts = diagnose()
    except ValueError as error:  # the environment asks for kernels that there are not
        refuse(str(error))
    width = max(len(fact.about) for fact in facts)
    for fact in facts:  # no table, which would cut a path at the terminal's edge
        typer.echo(f"{fact.about:{width}}  {fact.finding}")

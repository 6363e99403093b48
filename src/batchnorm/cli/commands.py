"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from batchnorm.audit import RULES, Report, Severity, find_rule, run_script
from batchnorm.audit.place import displayed
from batchnorm.cli.checking import check
from batchnorm.cli.files import example
from batchnorm.cli.options import (
    Form,
    FormOption,
    IgnoreOption,
    OutputOption,
    SelectOption,
    SeverityOption,
    StrictOption,
)
from batchnorm.cli.output import (
    BAD_INPUT,
    check_output,
    complain,
    print_in_form,
    refuse,
    write_report,
)
from batchnorm.cli.planning import plan
from batchnorm.cli.repairing import add_commands
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
) -> None:
    """Run a training script and report what its batch norm layers did.

    The script's output, exceptions and exit status stay its own; the report goes to standard
    error when it has ended. Options stand before SCRIPT; what follows it belongs to the script.
    Several processes, `torchrun --nproc-per-node 8 -m batchnorm run train.py`, report once.
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
    try:
        status, report = run_script(script, arguments or [], selection)
    except OSError as error:
        refuse(f"cannot read {script}: {error.strerror}")
    with contextlib.suppress(AttributeError, OSError, ValueError):  # the script may have closed it
        sys.stdout.flush()
    if _rank() == 0 or _has_more_to_say(report, status):
        print_in_form(report, form, Console(file=sys.__stderr__))
    if output is not None and _rank() == 0:
        try:
            write_report(report, output)
        except OSError as error:
            complain(f"cannot write {output}: {error.strerror}")
            status = status or BAD_INPUT
    # another rank's exit would end the first one's before it has reported
    if strict and status == 0 and not report.is_clean and _rank() == 0:
        status = 1
    raise typer.Exit(status)


app.command()(check)
app.command()(plan)
add_commands(app)


def _rank() -> int:
    """Of this process among those that torchrun or another launcher started."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _has_more_to_say(report: Report, status: int) -> bool:
    """Whether another rank than the first may be the only one that met with what it found."""
    errors = any(finding.severity is Severity.ERROR for finding in report.findings)
    return errors or (status != 0 and bool(report.findings))


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
    facts = diagnose()
    width = max(len(fact.about) for fact in facts)
    for fact in facts:  # no table, which would cut a path at the terminal's edge
        typer.echo(f"{fact.about:{width}}  {fact.finding}")

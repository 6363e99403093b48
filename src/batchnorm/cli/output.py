"""Where a report goes: to the terminal, and to a file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from batchnorm.audit import Report
from batchnorm.cli.options import Form
from batchnorm.report import FORMS, print_report, to_github
from batchnorm.report.files import write_atomically

__all__ = ["BAD_INPUT", "check_output", "complain", "print_in_form", "refuse", "write_report"]

BAD_INPUT = 2


def print_in_form(report: Report, form: Form, console: Console) -> None:
    """Print a report as text, or as annotations that GitHub reads from any output."""
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="backslashreplace")  # a terminal may have no γ
    if form is Form.GITHUB:
        console.file.write(to_github(report))
    else:
        print_report(report, console)


def write_report(report: Report, output: Path) -> None:
    """Write a report in the form that the file's name asks for; raises `OSError`."""
    write_atomically(output, FORMS[output.suffix](report))


def check_output(output: Path, script: Path) -> None:
    """Refuse what cannot be written, or must not, before hours of training and not after them."""
    if not output.parent.is_dir():
        refuse(f"no directory {output.parent} to write {output.name} into; create it first")
    if output.exists() and not output.is_file():
        refuse(f"{output} is no regular file; give the path of one, or of none yet")
    if output.resolve() == script.resolve():
        refuse(f"{output} is the script itself; give another path to write to")
    if output.suffix not in FORMS:
        refuse(f"{output.name} names no form of report; its name ends in {', '.join(FORMS)}")
    if not os.access(output.parent, os.W_OK):
        refuse(f"may not write into {output.parent}; give another path")


def complain(reason: str) -> None:
    """One clear line on standard error."""
    typer.echo(f"batchnorm: {reason}", err=True)


def refuse(reason: str) -> NoReturn:
    """One clear line, and the exit status of bad input."""
    complain(reason)
    raise typer.Exit(BAD_INPUT)

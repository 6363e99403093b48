"""Options that several commands have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.audit import Severity

__all__ = [
    "Form",
    "FormOption",
    "IgnoreOption",
    "OutputOption",
    "SelectOption",
    "SeverityOption",
    "StrictOption",
    "WaitOption",
]


class Form(str, Enum):
    """How findings are printed."""

    TEXT = "text"
    GITHUB = "github"


OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the report here: a .json, .sarif or .html, by its name."
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 where there are warnings or errors.")
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option(help="Only rules whose codes begin so: BN108,BN12. Repeatable."),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(help="Leave out rules whose codes begin so. Repeatable.")
]
SeverityOption = Annotated[
    Severity | None, typer.Option(help="Leave out what is less bad than this.")
]
FormOption = Annotated[
    Form, typer.Option("--format", help="Print text, or annotations for a GitHub workflow.")
]
WaitOption = Annotated[
    float,
    typer.Option(min=0, help="Under torchrun: seconds that the report waits for other ranks."),
]

"""`batchnorm lab`: list the claims, run their experiments, and make a page of what they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from batchnorm.cli.output import complain, refuse
from batchnorm.report.files import write_atomically

if TYPE_CHECKING:  # the laboratory's own libraries take seconds to import
    from batchnorm.lab.claim import AnyClaim
    from batchnorm.lab.conclusion import Conclusion
    from batchnorm.lab.runner import Failure

__all__ = ["lab"]

RESULTS = Path("batchnorm-lab")
INTERRUPTED = 130
P = ParamSpec("P")

lab = typer.Typer(
    help="Every claim about batch normalization, an experiment with an answer.",
    rich_markup_mode="markdown",
)


class ProfileName(str, Enum):
    """How much of the experiments is run; see `batchnorm.lab.profile`."""

    QUICK = "quick"
    FULL = "full"


def _equipped(command: Callable[P, None]) -> Callable[P, None]:
    """A command that says what is not installed of what it needs."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            import_module("batchnorm.lab.claims")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("batchnorm"):
                raise
            refuse(f"the laboratory needs {error.name}; pip install 'batchnorm[lab]'")
        command(*args, **kwargs)

    return wrapped


@lab.callback(invoke_without_command=True)
def claims(context: typer.Context) -> None:
    """List the claims, run their experiments, and make a page of what they say."""
    if context.invoked_subcommand is None:
        _list_claims()


@_equipped
def _list_claims() -> None:
    from batchnorm.lab.claims import CLAIMS

    table = Table(Column("", justify="right"), "name", "claim", box=None)
    for claim in CLAIMS:
        table.add_row(str(claim.number), claim.name, claim.sentence())
    console = Console()
    console.print(table)
    console.print("\nbatchnorm lab show NAME · batchnorm lab run NAME · batchnorm lab report")


@lab.command()
@_equipped
def show(name: Annotated[str, typer.Argument(help="A claim's name or number.")]) -> None:
    """Show a claim: its source, what is expected by how much, and how it is measured."""
    from batchnorm.lab.page import stated

    (claim,) = _claims([name])
    expected = "\n".join(f"- {h.where}: {h.measure}: {stated(h)}" for h in claim.hypotheses)
    page = (
        f"# {claim.number}. {claim.sentence()}\n\nSource: {claim.source}.\n\n"
        f"## Hypotheses\n\n{expected}\n\n## Protocol\n\n{claim.protocol()}"
    )
    Console().print(Markdown(page))


@lab.command()
@_equipped
def run(
    names: Annotated[list[str], typer.Argument(help="Names or numbers of claims, or all.")],
    profile: Annotated[
        ProfileName,
        typer.Option(
            help="quick shows in minutes that they run; full takes an hour or more, and answers."
        ),
    ] = ProfileName.QUICK,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="By default 5, and 1 of the quick profile.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where networks are trained, such as cuda.")] = "cpu",
    processes: Annotated[
        int | None, typer.Option(min=1, help="At work at once; by default one a core.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=f"The directory of the results: {RESULTS}/quick or /full."
        ),
    ] = None,
) -> None:
    """Run the experiments of claims; what was interrupted goes on where it was.

    Each claim leaves NAME.json, every trial's numbers with the answers, and the figure NAME.svg. A
    verdict needs the full profile and five seeds.
    """
    from batchnorm.lab.page import verdict_word
    from batchnorm.lab.profile import PROFILES, Profile
    from batchnorm.lab.record import RecordError
    from batchnorm.lab.runner import Step, run_claims

    chosen = _claims(names)
    _check_device(device)
    usual = PROFILES[profile.value]
    size = Profile(usual.name, seeds or usual.seeds)
    directory = output or RESULTS / profile.value
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all trials", total=0)
        done: dict[str, int] = {}
        totals: dict[str, int] = {}

        def tell(step: Step) -> None:
            name = step.claim.name
            if step.again:
                progress.console.print(
                    f"{name}: the experiment has changed since its last run; it begins anew"
                )
            if step.conclusion is not None:
                ended = step.conclusion
                progress.console.print(
                    f"{step.claim.number} {name}: {verdict_word(ended)}: {ended.reason()}",
                    highlight=False,
                    markup=False,
                )
            done[name], totals[name] = step.done, step.total
            progress.update(
                whole,
                completed=sum(done.values()),
                total=sum(totals.values()),
                description=f"{step.claim.number} {name}",
            )

        try:
            conclusions, failures = run_claims(
                chosen, size, directory, device=device, processes=processes, notify=tell
            )
        except KeyboardInterrupt:
            progress.stop()
            complain(f"interrupted; what had run is in {directory}: run again to go on")
            raise typer.Exit(INTERRUPTED) from None
        except RecordError as error:
            progress.stop()
            refuse(str(error))
        except RuntimeError as error:
            progress.stop()
            complain(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            progress.stop()
            refuse(f"cannot use {error.filename or directory}: {error.strerror}")
    _print(conclusions)
    typer.echo(f"\nResults and figures: {directory}. One page of them: batchnorm lab report")
    if failures:
        _complain_of(failures, directory)
        raise typer.Exit(1)


@lab.command()
@_equipped
def report(
    directory: Annotated[
        Path | None,
        typer.Argument(help=f"Of the results; by default {RESULTS}/full, or else /quick."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page, .html (all in one file) or .md (with links); by default "
            "evidence.html beside the results.",
        ),
    ] = None,
) -> None:
    """Make one page of the results: claim, verdict, effect with interval, figure."""
    from batchnorm.lab.claims import CLAIMS
    from batchnorm.lab.conclusion import conclude
    from batchnorm.lab.page import to_html, to_markdown
    from batchnorm.lab.record import Record, RecordError, record_path
    from batchnorm.lab.runner import draw

    if directory is None:
        directory = next((d for d in (RESULTS / "full", RESULTS / "quick") if d.is_dir()), None)
        if directory is None:
            refuse(f"no results in {RESULTS}; make some: batchnorm lab run all")
    page = output or directory / "evidence.html"
    if page.suffix not in (".html", ".md"):
        refuse(f"{page.name} names no form of page; its name ends in .html or .md")
    found = [claim for claim in CLAIMS if record_path(directory, claim).is_file()]
    if not found:
        refuse(f"no results in {directory}; make some: batchnorm lab run all")
    try:
        conclusions = [conclude(c, Record.load(record_path(directory, c))) for c in found]
        whole = [each for each in conclusions if not each.missing]
        if not whole:
            refuse(f"no claim in {directory} has run to its end; go on: batchnorm lab run")
        figures = [draw(each, directory).read_text("utf-8") for each in whole]
        if page.suffix == ".md":
            text = to_markdown(whole, directory, page)
        else:
            text = to_html(whole, figures)
        write_atomically(page, text)
    except RecordError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot use {error.filename or page}: {error.strerror}")
    _print(conclusions)
    typer.echo(f"\n{page}")


def _claims(names: Sequence[str]) -> list[type[AnyClaim]]:
    from batchnorm.lab.claims import CLAIMS, find_claim

    if "all" in names:
        return list(CLAIMS)
    try:
        chosen = {find_claim(name) for name in names}
    except LookupError as error:
        refuse(error.args[0])
    return [claim for claim in CLAIMS if claim in chosen]


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]}")


def _print(conclusions: Sequence[Conclusion]) -> None:
    """Each claim's verdict and effects."""
    from batchnorm.lab.page import effect_of, stated, verdict_word

    console = Console()
    for each in conclusions:
        claim = each.claim
        console.print(f"{claim.number} {claim.name}: [bold]{verdict_word(each)}", highlight=False)
        if not each.judgements:
            console.print(f"  {each.reason()}", highlight=False)
            continue
        table = Table.grid(padding=(0, 2, 0, 0))
        for wraps in (False, False, False, True):
            table.add_column(no_wrap=not wraps)
        for j in each.judgements:
            bar = stated(j.hypothesis)
            cells = (f"  {j.answer.value}", effect_of(j), bar, each.setting(j))
            table.add_row(*map(Text, cells))  # brackets are no markup
        console.print(table)


def _complain_of(failures: Sequence[Failure], directory: Path) -> None:
    for failure in failures[:5]:
        where = failure.trial or "its conclusion"
        complain(f"{failure.claim.name} failed in {where}: {failure.reason}")
    if len(failures) > 5:
        complain(f"and {len(failures) - 5} more failed")
    complain(f"where they failed stands in {directory / 'failures.txt'}")

"""The evidence: what was measured of every claim, as one page."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from batchnorm.lab.conclusion import Conclusion
from batchnorm.lab.hypothesis import ENOUGH_SEEDS, Hypothesis, Judgement
from batchnorm.lab.interval import LEVEL
from batchnorm.lab.record import Record
from batchnorm.report.scale import number
from batchnorm.report.summary import count

__all__ = ["effect_of", "stated", "to_html", "to_markdown", "verdict_word"]


def verdict_word(conclusion: Conclusion) -> str:
    """The verdict, or that there is none."""
    if conclusion.missing:
        return "unfinished"
    return "no verdict" if conclusion.verdict is None else conclusion.verdict.value


def stated(hypothesis: Hypothesis) -> str:
    """What was said before the run: "> 1.5 ×"."""
    if hypothesis.more_than is not None:
        return f"> {_with_unit(hypothesis.more_than, hypothesis.unit)}"
    assert hypothesis.less_than is not None
    return f"< {_with_unit(hypothesis.less_than, hypothesis.unit)}"


def effect_of(judgement: Judgement) -> str:
    """What was measured: "1.93 × [1.62, 2.31]", without the interval for a single seed."""
    interval = judgement.interval
    mean = _with_unit(interval.mean, judgement.hypothesis.unit)
    if interval.n == 1:
        return mean
    return f"{mean} [{number(interval.low)}, {number(interval.high)}]"


def to_markdown(conclusions: Sequence[Conclusion], directory: Path, page: Path) -> str:
    """The page in Markdown, with links to the figures and results in the directory.

    Args:
        conclusions: What is shown, in this order.
        directory: Where the figures lie.
        page: Where the page will lie, which the links start from.
    """
    folder = quote(Path(os.path.relpath(directory.resolve(), page.resolve().parent)).as_posix())
    lines = [
        "# What is said of batch normalization, measured",
        "",
        _about(conclusions),
        "",
        *_table(
            ("", "claim", "verdict", f"effect, with its {LEVEL:.0%} interval", "figure"),
            [_summary(each, folder) for each in conclusions],
        ),
    ]
    for each in conclusions:
        lines += ["", *_section(each, folder)]
    return "\n".join(lines) + "\n"


def to_html(conclusions: Sequence[Conclusion], figures: Iterable[str]) -> str:
    """The page in HTML, in one file that asks nothing of anybody: the figures stand within it.

    Args:
        conclusions: What is shown, in this order.
        figures: The SVG of each.
    """
    environment = Environment(
        loader=PackageLoader("batchnorm.lab"), autoescape=True, undefined=StrictUndefined
    )
    rows = [(each, _inline(svg)) for each, svg in zip(conclusions, figures, strict=True)]
    return environment.get_template("evidence.html.jinja").render(
        rows=rows,
        about=_rendered(_about(conclusions)),
        level=f"{LEVEL:.0%}",
        effect_of=effect_of,
        stated=stated,
        ran=_ran,
        anchor=_anchor,
        heading=_heading,
        verdict_word=verdict_word,
        rendered=_rendered,
    )


def _about(conclusions: Sequence[Conclusion]) -> str:
    """How the page came to be, and how to read it."""
    records = [each.record for each in conclusions]
    seeds = sorted({each.record.seeds for each in conclusions})
    minutes = sum(done.seconds for each in conclusions for done in each.record.done.values()) / 60
    trials = sum(len(each.results) for each in conclusions)
    machines = sorted({_machine(record) for record in records})
    profiles = " and ".join(sorted({record.profile for record in records}))
    return (
        f"Made by `batchnorm lab run all --profile {profiles}` and `batchnorm lab report`: "
        f"{count(trials, 'trial')}, n = {' or '.join(map(str, seeds))} seeds, {minutes:,.0f} "
        f"minutes of one core ({'; '.join(machines)}). Each hypothesis was stated before the run, "
        "in the claim's file. It "
        f"*holds* where the whole {LEVEL:.0%} interval of the mean over the seeds (Student's t; "
        "for ratios, ×, of the geometric mean) is beyond what was stated, *fails* where the whole "
        "of it is not, and is *open* where that is inside. A claim is *supported* where all its "
        "hypotheses hold, *not supported* where none does, and else *depends*. Nothing of this is "
        f"written by hand, and there is no verdict from fewer than {ENOUGH_SEEDS} seeds. What was "
        "changed after pilot runs, of other seeds, or after a first run is said in the protocols. "
        "The data and the networks are small: what is shown here holds for them."
    )


def _machine(record: Record) -> str:
    of = record.environment
    return (
        f"PyTorch {of['torch']}, Python {of['python']}, {of['processor']}, device {record.device}"
    )


def _summary(each: Conclusion, folder: str) -> list[str]:
    name = each.claim.name
    effects = "<br>".join(
        f"{each.setting(j)}: {effect_of(j)}, {j.answer.value}" for j in each.judgements
    )
    return [
        str(each.claim.number),
        f"[{each.claim.sentence()}](#{_anchor(each)})",
        f"**{verdict_word(each)}**",
        effects,
        f"[figure]({folder}/{name}.svg)",
    ]


def _section(each: Conclusion, folder: str) -> list[str]:
    name = each.claim.name
    rows = [
        [
            j.hypothesis.where,
            j.hypothesis.measure,
            stated(j.hypothesis),
            effect_of(j),
            j.answer.value,
        ]
        for j in each.judgements
    ]
    verdict = verdict_word(each)
    return [
        f"## {_heading(each)}",
        "",
        f"**{verdict[0].upper()}{verdict[1:]}**: {each.reason()}.",
        "",
        f"![{each.claim.sentence()}]({folder}/{name}.svg)",
        "",
        *_table(("where", "measure", "stated before", "measured", "answer"), rows),
        "",
        f"Source: {each.claim.source}.",
        "",
        each.claim.protocol(),
        "",
        f"{_ran(each)} [All numbers]({folder}/{name}.json).",
    ]


def _ran(each: Conclusion) -> str:
    minutes = sum(done.seconds for done in each.record.done.values()) / 60
    told = f"{len(each.results):,} trials, {minutes:.1f} minutes of one core."
    return told if each.is_current else f"{told} The experiment has been changed since this run."


def _heading(each: Conclusion) -> str:
    return f"{each.claim.number}. {each.claim.sentence().rstrip('.')}"


def _anchor(each: Conclusion) -> str:
    """As GitHub makes one of a heading."""
    kept = "".join(c for c in _heading(each).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]


def _with_unit(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".rstrip()


def _rendered(text: str) -> Markup:
    """Markdown of the claim's own code as HTML."""
    return Markup(MarkdownIt("commonmark", {"html": False}).render(text))  # noqa: S704 - escaped


def _inline(svg: str) -> str:
    """A picture's address that is the picture."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"

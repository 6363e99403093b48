"""A report as one page that opens from a disk, and asks nothing of anybody."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from batchnorm import __version__
from batchnorm.audit import Finding, Report, Rule, Severity, find_rule
from batchnorm.report.charts import depth_charts
from batchnorm.report.run_charts import gradient_chart, timeline_chart
from batchnorm.report.scale import number
from batchnorm.report.summary import count, endings, grouped, headline, looked, on_ranks
from batchnorm.report.visible import visible

__all__ = ["to_html"]

_PLURALS = {Severity.ERROR: "errors", Severity.WARNING: "warnings", Severity.INFO: "facts"}
_SINGULARS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "fact"}
_PAGE_HEADINGS = {"h2": "h4", "h3": "h5", "h4": "h6"}  # below the finding's, which is an h3


def to_html(report: Report) -> str:
    """The page: what was found, why it matters, and charts of what was measured.

    It has no script, no font and no picture from elsewhere, and a policy that forbids them; all
    that came from outside is escaped.
    """
    groups = _groups(report)
    drawn = [c for c in (gradient_chart(report.profiles), timeline_chart(report.timeline)) if c]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            version=__version__,
            report=report,
            headline=headline(report),
            looked=looked(report),
            endings=endings(report),
            ranks_of=partial(on_ranks, report=report),
            groups=groups,
            counts=_counts(report),
            depth=depth_charts(report.profiles),
            run=drawn,
            lacks_gradients=not any(p.gradients for p in report.profiles),
            lacks_timeline=not report.timeline,
            rules=_rules(report, groups),
        )
    )


@dataclass(frozen=True)
class _Group:
    """Findings of one rule and severity.

    `fix`: the one that they share, if they do. `page`: the rule's, where no group before has it;
    `page_id`: where it stands.
    """

    id: str
    code: str
    name: str
    severity: Severity
    findings: list[Finding]
    fix: str | None
    page: Markup | None
    page_id: str | None


@dataclass(frozen=True)
class _Row:
    """A rule that looked."""

    code: str
    name: str
    looks_at: str
    found: int
    reason: str | None
    link: str | None


def _groups(report: Report) -> list[_Group]:
    groups: list[_Group] = []
    pages: dict[str, str] = {}
    for findings in grouped(report.findings):
        first = findings[0]
        rule = _rule(first.code)
        key = f"finding-{len(groups) + 1}"
        fixes = {finding.fix for finding in findings}
        is_new = rule is not None and first.code not in pages
        if is_new:
            pages[first.code] = f"{key}-page"
        page = _page(rule) if rule is not None and is_new else None
        groups.append(
            _Group(
                key,
                first.code,
                first.name,
                first.severity,
                findings,
                first.fix if len(fixes) == 1 else None,
                page,
                pages.get(first.code),
            )
        )
    return groups


def _counts(report: Report) -> list[tuple[Severity, int, str]]:
    """How many of each severity, the worst first."""
    counts = []
    for severity in Severity:
        n = sum(finding.severity is severity for finding in report.findings)
        counts.append((severity, n, (_SINGULARS if n == 1 else _PLURALS)[severity]))
    return counts


def _rules(report: Report, groups: list[_Group]) -> list[_Row]:
    rows = []
    codes = [*report.rules, *report.disabled, *(group.code for group in groups)]
    for code in dict.fromkeys(codes):
        own = [group for group in groups if group.code == code]
        rule = _rule(code)
        name = rule.name if rule is not None else own[0].name if own else ""
        rows.append(
            _Row(
                code,
                name,
                "" if rule is None else rule.looks_at,
                sum(len(group.findings) for group in own),
                report.disabled.get(code),
                own[0].id if own else None,
            )
        )
    return rows


def _rule(code: str) -> type[Rule] | None:
    try:
        return find_rule(code)
    except KeyError:
        return None  # somebody else's


def _page(rule: type[Rule]) -> Markup:
    """A rule's page as HTML, its headings below the finding's; HTML in it is text."""
    markdown = MarkdownIt("commonmark", {"html": False}).disable("image")
    tokens = [_lowered(token) for token in markdown.parse(rule.page()) if not _is_title(token)]
    # its title stands above it already
    if tokens and tokens[0].type == "inline":
        del tokens[0]
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # noqa: S704 - escaped


def _is_title(token: Token) -> bool:
    return token.type in ("heading_open", "heading_close") and token.tag == "h1"


def _lowered(token: Token) -> Token:
    if token.type in ("heading_open", "heading_close"):
        token.tag = _PAGE_HEADINGS.get(token.tag, "h6")
    return token


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "number": number}
    environment.globals |= {"count": count}
    return environment

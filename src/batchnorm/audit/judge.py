"""Let rules look, keep what was asked for, and go on where one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding
from batchnorm.audit.rank_view import RankView, RankViews
from batchnorm.audit.rule import Rule
from batchnorm.audit.selection import Selection
from batchnorm.audit.state import State
from batchnorm.models.graph import Graph

__all__ = ["Look", "evidence_for", "graph_for", "judge", "state_for", "views_for"]

Look = tuple[Rule, Callable[[], Iterable[Finding]]]
"""A rule, and how it is asked for its findings."""


def judge(
    looks: Iterable[Look], selection: Selection, disabled: dict[str, str]
) -> Iterator[Finding]:
    """What the rules find, worst first; a rule that raises is added to `disabled`."""
    findings: list[Finding] = []
    with torch.no_grad():
        for rule, look in looks:
            try:
                findings.extend(filter(selection.keeps, look()))
            except Exception as error:
                disabled[rule.code] = f"{type(error).__name__}: {error}"
    yield from sorted(findings, key=lambda f: (f.severity.rank, f.code, f.modules))


def state_for(code: str, state: State, selection: Selection) -> State:
    """The state without the layers that a rule is to leave out."""
    if not selection.modules:
        return state
    kept = tuple(layer for layer in state.layers if not selection.ignores(code, layer.path))
    return replace(state, layers=kept)


def graph_for(code: str, graph: Graph, selection: Selection) -> Graph:
    """The graph without the batch norms that a rule is to leave out."""
    if not selection.modules:
        return graph
    nodes = graph.nodes
    kept = [n for n in nodes if not (n.is_norm and selection.ignores(code, n.name))]
    return Graph(graph.read_by, kept)


def evidence_for(code: str, evidence: Evidence, selection: Selection) -> Evidence:
    """The evidence without the layers that a rule is to leave out."""
    if not selection.modules:
        return evidence
    return replace(
        evidence,
        layers=[e for e in evidence.layers if not selection.ignores(code, e.path)],
        samples={p: s for p, s in evidence.samples.items() if not selection.ignores(code, p)},
        uncalled=[path for path in evidence.uncalled if not selection.ignores(code, path)],
    )


def views_for(code: str, ranks: RankViews, selection: Selection) -> RankViews:
    """What the ranks told, without the layers that a rule is to leave out."""
    if not selection.modules:
        return ranks
    return replace(ranks, views=[_view_for(code, view, selection) for view in ranks.views])


def _view_for(code: str, view: RankView, selection: Selection) -> RankView:
    layers = tuple(each for each in view.layers if not selection.ignores(code, each.path))
    calls = tuple(
        replace(
            own,
            counts={n: k for n, k in own.counts.items() if not selection.ignores(code, n)},
            last=tuple(name for name in own.last if not selection.ignores(code, name)),
        )
        for own in view.calls
    )
    return replace(view, layers=layers, calls=calls)

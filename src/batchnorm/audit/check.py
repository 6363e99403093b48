"""Check what lies still: checkpoints and models, and what batches do in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.export import ExportedProgram

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Report
from batchnorm.audit.gathering import LIMIT, Loss, Mask, gather
from batchnorm.audit.judge import Look, evidence_for, graph_for, judge, state_for
from batchnorm.audit.profiling import profiles_of
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES
from batchnorm.audit.selection import Selection
from batchnorm.audit.shared_moments import share_moments
from batchnorm.audit.state import State, state_of
from batchnorm.audit.synchronizing import ask_nobody, keep_apart
from batchnorm.audit.together import audit_together, refuse_to_wait
from batchnorm.models.calling import Forward
from batchnorm.models.graph import Graph
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.models.tracing import graph_of
from batchnorm.ranks import size_of

__all__ = ["audit", "check"]


def audit(
    model: nn.Module | ExportedProgram,
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    deploy: Iterable[Any] | None = None,
    reference: nn.Module | State | None = None,
    rules: Iterable[type[Rule]] = RULES,
    selection: Selection | None = None,
    name: str | None = None,
    group: dist.ProcessGroup | None = None,
    wait: float = 60.0,
) -> Report:
    """Look at a model, and at what batches do in it; the model is left exactly as it was.

    ```python
    audit(model).findings                        # what its layers alone tell
    audit(model, loader)                         # and what they are given in training mode
    audit(model, loader, loss=label_loss)        # and what that does to the loss
    audit(model, loader, forward=lambda model, batch: model(batch["image"], batch["age"]))
    audit(model, loader, deploy=other_loader)    # and whether that is what they will be given
    audit(model, shard, group=dist.group.WORLD)  # on all ranks, and whether they agree
    ```

    - `model`: a program that `torch.export` made is looked at for its operations.
    - `batches`: tensors, tuples (of which the first entry is the input), dictionaries or
      dataclasses (whose entries are the model's arguments by name); up to 32 are looked at.
    - `forward(model, batch)`: how to call the model, where that does not fit.
    - `loss(output, batch)`: how wrong an answer is; `label_loss` for labels.
    - `mask(batch)`: where a batch holds data and no padding, (n, *positions), true for data.
    - `deploy`: batches as the model will be given them where it is used.
    - `reference`: what the weights came from, for the rules that compare.
    - `rules`: those that look; by default all that look at a model or at batches.
    - `selection`: what of that to report; see `Selection`.
    - `name`: what the report calls the model; by default its class.
    - `group`: ranks of which all call this, each with its own batches. All get the same report, of
      what any of them found and what differs between them (BN112, BN114); layers that
      synchronize are judged by the batches of all their ranks. Without it a rank looks alone.
    - `wait`: seconds that ranks wait for each other to call.

    Modes of every module, buffers, random state, hooks and gradients are what they were, also
    where the model raises.

    Raises what the model raises, and `ValueError` for an iterable without batches, and for one
    rank alone with batches for layers that would wait for others. With a group, `TimeoutError`
    names ranks that did not come, and `RuntimeError` one that failed.
    """
    name = name or type(model).__name__
    selection = selection or Selection()
    if isinstance(model, ExportedProgram):
        if batches is not None:
            raise ValueError("an exported program is read and not run; give the model for batches")
        model = model.module()
    if batches is None and (deploy is not None or loss is not None or mask is not None):
        raise ValueError("`deploy`, `loss` and `mask` need batches to look at; got none")
    if isinstance(reference, nn.Module):
        reference = state_of(reference, type(reference).__name__)
    rules = list(rules)
    needs_graph = any(r.read is not Rule.read and selection.looks(r.code) for r in rules)

    def look(data: Iterable[Any] | None) -> Report:
        first, evidence = None, None
        with left_as_it_was(model):
            keep_apart(model)
            if data is not None:
                data = list(islice(data, LIMIT))
                first = data[0] if data else None
                evidence = gather(model, data, forward, loss=loss, mask=mask, deploy=deploy)
                if is_together:
                    share_moments(model, evidence)
            ask_nobody(model)
            graph = graph_of(model, first, forward) if needs_graph else None
        return check(
            [state_of(model, name)],
            rules,
            evidence,
            reference=reference,
            graphs=[] if graph is None else [graph],
            selection=selection,
        )

    is_together = group is not None and size_of(group) != 1  # which raises outside of it
    if group is not None and is_together:
        return audit_together(model, batches, forward, look, group, wait, rules, selection)
    if batches is not None:
        refuse_to_wait(model)
    return look(batches)


def check(
    states: Iterable[State],
    rules: Iterable[type[Rule]] = RULES,
    evidence: Evidence | None = None,
    *,
    reference: State | None = None,
    graphs: Iterable[Graph] = (),
    selection: Selection | None = None,
) -> Report:
    """What the rules find in these states, in their graphs and in the evidence, worst first."""
    states, graphs = list(states), list(graphs)
    selection = selection or Selection()
    looks: list[Look] = []
    for kind in rules:
        if selection.looks(kind.code):
            looks.extend(_looks(kind(), states, evidence, reference, graphs, selection))
    disabled: dict[str, str] = {}
    findings = tuple(judge(looks, selection, disabled))
    return Report(
        findings,
        layers=sum(len(state.layers) for state in states),
        calls=0 if evidence is None else evidence.batches,
        rules=tuple(dict.fromkeys(rule.code for rule, _ in looks)),
        disabled=disabled,
        subject=", ".join(state.name for state in states),
        graph=", ".join(dict.fromkeys(graph.read_by for graph in graphs)) or None,
        profiles=() if evidence is None else profiles_of(evidence),
    )


def _looks(
    rule: Rule,
    states: list[State],
    evidence: Evidence | None,
    reference: State | None,
    graphs: list[Graph],
    selection: Selection,
) -> Iterator[Look]:
    """The ways in which a rule can look at what there is."""
    kind, code = type(rule), rule.code
    for state in states:
        seen = state_for(code, state, selection)
        prefix = f"{state.name}: " if len(states) > 1 else ""
        if kind.examine is not Rule.examine:
            yield rule, partial(_named, prefix, rule.examine, seen)
        if kind.compare is not Rule.compare and reference is not None:
            yield rule, partial(_named, prefix, rule.compare, seen, reference)
    if kind.read is not Rule.read:
        for graph in graphs:
            yield rule, partial(rule.read, graph_for(code, graph, selection))
    if kind.weigh is not Rule.weigh and evidence is not None:
        yield rule, partial(rule.weigh, evidence_for(code, evidence, selection))


def _named(
    prefix: str, look: Callable[..., Iterable[Finding]], *states: State
) -> Iterator[Finding]:
    """With the state's name before each layer's, where there are several states."""
    for finding in look(*states):
        yield replace(finding, modules=tuple(prefix + path for path in finding.modules))

"""What a rank found, as bytes that another can read without running anything of it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from batchnorm.audit.finding import Finding, Report, Severity
from batchnorm.audit.rank_view import Calls, LayerView, RankView, Statistics
from batchnorm.ranks.store import LARGEST

__all__ = ["TELLING", "Note", "packed", "packed_statistics", "unpacked", "unpacked_statistics"]

MOST_FINDINGS = 200
MOST_MODULES = 200  # of a finding
TELLING = 16  # ranks that tell their statistics whole: one server holds them all


@dataclasses.dataclass(frozen=True)
class Note:
    """What a rank tells when it has ended.

    - `report`: without measurements, timeline and endings, which one rank tells.
    - `place`: `file:line` where it stood when it was told to end.
    """

    view: RankView
    report: Report
    place: str | None = None


def packed(note: Note) -> bytes:
    """JSON, compressed; of very much, the worst findings without the layers."""
    report = dataclasses.replace(note.report, profiles=(), timeline=(), endings=())
    data = _compressed(dataclasses.replace(note, report=report))
    if len(data) <= LARGEST:
        return data
    few = tuple(
        dataclasses.replace(finding, modules=finding.modules[:MOST_MODULES])
        for finding in report.findings[:MOST_FINDINGS]
    )
    view = dataclasses.replace(note.view, layers=(), calls=())
    report = dataclasses.replace(report, findings=few)
    return _compressed(dataclasses.replace(note, report=report, view=view))


def unpacked(data: bytes) -> Note:
    """The note."""
    held = json.loads(zlib.decompress(data))
    return Note(_view(held["view"]), _report(held["report"]), held["place"])


def packed_statistics(statistics: Mapping[str, Statistics]) -> bytes:
    """Means and variances by digest, as safetensors; of very many, the first."""
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for digest, pair in statistics.items():
        size += sum(t.nbytes + 200 for t in pair)  # and what the header says of each
        if digest and size < LARGEST:
            tensors[f"{digest}.mean"], tensors[f"{digest}.var"] = (t.contiguous() for t in pair)
    return save(tensors)


def unpacked_statistics(data: bytes) -> dict[str, Statistics]:
    """Means and variances by digest."""
    tensors = load(data)
    digests = dict.fromkeys(name.partition(".")[0] for name in tensors)
    return {d: (tensors[f"{d}.mean"], tensors[f"{d}.var"]) for d in digests}


def _compressed(note: Note) -> bytes:
    return zlib.compress(json.dumps(dataclasses.asdict(note)).encode())


def _view(held: dict[str, Any]) -> RankView:
    layers = tuple(LayerView(**layer | {"asks": tuple(layer["asks"])}) for layer in held["layers"])
    lists = ("ranks", "last")
    calls = tuple(Calls(**c | {name: tuple(c[name]) for name in lists}) for c in held["calls"])
    return RankView(**held | {"layers": layers, "calls": calls})


def _report(held: dict[str, Any]) -> Report:
    findings = tuple(_finding(finding) for finding in held["findings"])
    lists = {"findings": findings, "rules": tuple(held["rules"])}
    return Report(**held | lists | {"profiles": (), "timeline": (), "endings": ()})


def _finding(held: dict[str, Any]) -> Finding:
    lists = {name: tuple(held[name]) for name in ("modules", "ranks")}
    return Finding(**held | lists | {"severity": Severity(held["severity"])})

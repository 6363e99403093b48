"""BN112: ranks hold different running statistics."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from batchnorm.audit.distance import LARGEST_SHIFT, LARGEST_STRETCH, apart
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rank_view import LayerView, RankView, RankViews, Statistics
from batchnorm.audit.rule import Rule, repair

__all__ = ["Disagreement", "RanksDiffer", "disagreements"]

NOTHING = 1e-3  # of a standard deviation: what rounding may leave
LARGE_SHIFT = 0.1  # of a standard deviation, between two networks of which one result is made
LARGE_STRETCH = 1.1  # of the standard deviation, either way


class RanksDiffer(Rule):
    """## What it finds

    Layers whose running statistics were not the same on all ranks that evaluated the model the
    last time, or are not the same when the run has ended. Told with the largest difference
    between two ranks, as root mean square over a layer's channels. `audit(..., group=...)`
    compares the model as it is.

    ## Why it hurts

    Each rank learns the statistics of its own batches. Ranks that then evaluate a part of the
    data each evaluate as many networks, and the accuracy that they add up is none of them's; a
    checkpoint holds what one rank has seen, which is one of its many shards.

    ## Example

        model = DistributedDataParallel(model, broadcast_buffers=False)   # or FSDP, or by hand
        train(model, loader)
        correct = evaluate(model.eval(), shard)                 # on each rank with its own
        dist.all_reduce(correct)

    ## Fix

    `batchnorm.reduce_statistics(model)` on all ranks, before evaluating and saving: it merges
    them by count. Layers with `statistics=Sync()` have the same on all ranks all the time.

    ## When it is fine

    Between steps, under `DistributedDataParallel` with broadcast of its buffers: ranks differ by
    their last batch, and the next forward pass through the wrapper writes rank 0's over the
    others'. Nothing is said of it, unless ranks evaluate the wrapped module itself and so keep
    their own. Where one rank alone evaluates and saves, and the ranks' data are alike, its
    statistics are as good as the others': a small difference at the end is an `info`. Ranks that
    train models of their own, with other weights or without a process group, are not compared.

    It is a warning from 0.1 standard deviations (or a factor of 1.1 between the standard
    deviations) on in what was evaluated, from 0.5 (or 1.5) on in what was not.

    ## Evidence

    huggingface/pytorch-image-models#110, facebookresearch/fvcore#152
    """

    code = "BN112"
    name = "ranks hold different running statistics"
    looks_at = "ranks"

    def confront(self, ranks: RankViews) -> Iterator[Finding]:
        """One finding for what was evaluated, and one for what was not; the farthest first."""
        found: dict[When, list[_Apart]] = defaultdict(list)
        for each in disagreements(ranks.views):
            farthest = _farthest(each, ranks.statistics)
            if not 0 <= farthest.size <= NOTHING:
                found[each.when].append(farthest)
        for when, layers in found.items():
            layers.sort(key=lambda layer: -layer.size)
            yield self._judged(when, layers)

    def _judged(self, when: When, layers: list[_Apart]) -> Finding:
        worst, paths = layers[0], [layer.path for layer in layers]
        shift, stretch = LARGE_SHIFT, LARGE_STRETCH
        size = in_layers(paths)
        if worst.is_known:
            size = (
                f"by {worst.shift:.2g} standard deviations in the mean and ×{worst.factor:.3g} in "
                f"the standard deviation ({worst.path}, {size})"
            )
        if when == "at the end":
            shift, stretch = LARGEST_SHIFT, LARGEST_STRETCH
            size += "; a checkpoint has those of the rank that saves it"
        is_large = worst.shift > shift or worst.factor > stretch
        one, other = worst.ranks
        return self.found(
            Severity.WARNING if is_large else Severity.INFO,
            f"ranks {one} and {other} {_DOING[when]} running statistics that differ {size}",
            paths,
            repair("reduce_statistics(model)", "on all ranks, before evaluating and saving"),
            shift=worst.shift if worst.is_known else math.nan,
            stretch=worst.factor if worst.is_known else math.nan,
            layers=float(len(paths)),
            rank=float(one),
            other_rank=float(other),
        )


When = Literal["evaluated", "as they are", "at the end"]

_DOING: Mapping[When, str] = {
    "evaluated": "evaluated with",
    "as they are": "hold",
    "at the end": "end with",
}


@dataclass(frozen=True)
class Disagreement:
    """A layer whose running statistics are not the same on some ranks of one model.

    - `when`: what they were used for, or when they were looked at.
    - `digests`: of each rank's.
    """

    path: str
    eps: float
    when: When
    digests: Mapping[int, str]


def disagreements(views: Sequence[RankView]) -> list[Disagreement]:
    """Where ranks that have the same model differ, and it is no passing state.

    A layer that was evaluated on several ranks is compared as it was then.
    """
    found: list[Disagreement] = []
    for ranks in _with_one_model(views):
        for name in dict.fromkeys(name for layers in ranks.values() for name in layers):
            own = {rank: layers[name] for rank, layers in ranks.items() if name in layers}
            found.extend(_disagreements(own, {v.rank: v for v in views}))
    return found


def _disagreements(
    layers: Mapping[int, LayerView], views: Mapping[int, RankView]
) -> Iterator[Disagreement]:
    path, eps = layers[min(layers)].path, max(layer.eps for layer in layers.values())
    times = Counter(layer.evaluations for layer in layers.values() if layer.used)
    last = max((time for time, ranks in times.items() if ranks > 1), default=0)
    evaluated = {r: layer.used for r, layer in layers.items() if layer.evaluations == last}
    if last:
        if len(set(evaluated.values())) > 1:
            yield Disagreement(path, eps, "evaluated", evaluated)
        return
    held = {rank: layer.held for rank, layer in layers.items() if layer.held}
    if len(set(held.values())) < 2 or any(layer.is_broadcast for layer in layers.values()):
        return
    if all(views[rank].is_together for rank in held):
        yield Disagreement(path, eps, "as they are", held)
    elif all(views[rank].status == 0 for rank in held):  # else some were a step ahead
        yield Disagreement(path, eps, "at the end", held)


_Model = Mapping[str, LayerView]


def _with_one_model(views: Sequence[RankView]) -> list[dict[int, _Model]]:
    """The layers by rank and name of each model on the ranks that have it, with the same γ."""
    groups: list[dict[int, _Model]] = []
    for view in views:
        if not view.is_connected:
            continue  # it trains for itself
        models: dict[str, dict[str, LayerView]] = defaultdict(dict)
        for layer in view.layers:
            models["" if view.is_together else layer.path.partition(".")[0]][layer.name] = layer
        for model in models.values():
            same = (g for g in groups if view.rank not in g and _are_one(model, g[min(g)]))
            group = next(same, None)
            if group is None:
                group = {}
                groups.append(group)
            group[view.rank] = model
    return [group for group in groups if len(group) > 1]


def _are_one(model: _Model, other: _Model) -> bool:
    common = model.keys() & other.keys()
    return bool(common) and all(model[name].weights == other[name].weights for name in common)


@dataclass(frozen=True)
class _Apart:
    """How far a layer's statistics are apart, on the two ranks where they are farthest apart.

    `size` is that of the larger of both numbers; -1 where the statistics are not at hand.
    """

    path: str
    ranks: tuple[int, int]
    shift: float = 0.0
    factor: float = 1.0
    size: float = -1.0

    @property
    def is_known(self) -> bool:
        """Whether it was measured."""
        return self.size >= 0


def _farthest(each: Disagreement, statistics: Mapping[str, Statistics]) -> _Apart:
    ranks: dict[str, int] = {}
    for rank, digest in sorted(each.digests.items()):
        ranks.setdefault(digest, rank)
    first, second = list(ranks.values())[:2]
    farthest = _Apart(each.path, (first, second))
    for one, other in combinations([digest for digest in ranks if digest in statistics], 2):
        shift, stretch = apart(statistics[one], statistics[other], each.eps)
        size = max(shift, stretch)
        if size > farthest.size:
            pair = ranks[one], ranks[other]
            farthest = _Apart(each.path, pair, shift, math.exp(stretch), size)
    return farthest

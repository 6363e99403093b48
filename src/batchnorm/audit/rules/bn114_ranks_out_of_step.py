"""BN114: ranks disagree on mode or on the number of calls of layers that synchronize."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from batchnorm.audit.finding import Finding, Severity, ranks_named
from batchnorm.audit.rank_view import Calls, LayerView, RankView, RankViews, sequences_of
from batchnorm.audit.rule import Rule

__all__ = ["RanksOutOfStep"]


class RanksOutOfStep(Rule):
    """## What it finds

    Layers that synchronize, `torch.nn.SyncBatchNorm` and those with the policy `Sync`, which not
    all ranks of their group call equally often in training mode, or in the same order, or which
    are in eval mode on some ranks of a model that trains on all.

    ## Why it hurts

    In training mode each call of such a layer is a collective: it waits until every rank has come
    to the same one. Where a rank leaves one out, the others wait for it until their time limit,
    half an hour by default on gloo, and the run is lost; or they take the numbers of another
    layer for its own, and nobody is told.

    ## Example

        for x, y in loader:                 # 28 batches on rank 0, 27 on rank 1
            criterion(model(x), y).backward()

        if random() < 0.5:                  # not the same on all ranks
            x = x + self.branch(x)          # with a SyncBatchNorm in it

    ## Fix

    The same number of batches on each rank (`DistributedSampler`, or `drop_last=True` where a
    shard may be shorter), branches that are taken on all ranks or on none (a generator of its own
    with the same seed), `train()` and `eval()` on all ranks.

    ## When it is fine

    In eval mode nobody is waited for: one rank may evaluate alone while the others train on or
    wait, and nothing is said of it. A rank that raised an error has fewer calls than the others
    because of it; its error is the cause, and nothing is said either. Layers of other groups are
    other layers.

    ## Evidence

    open-mmlab/mmengine#1624, pytorch/pytorch#48988
    """

    code = "BN114"
    name = "ranks out of step where they synchronize"
    looks_at = "ranks"

    def confront(self, ranks: RankViews) -> Iterator[Finding]:
        """One finding for the flags, and for each group of ranks one where its calls part."""
        views = {view.rank: view for view in ranks.views}
        layers = {r: {layer.name: layer for layer in view.layers} for r, view in views.items()}
        modes = list(self._modes(ranks.views, layers))
        if modes or len({view.is_evaluating for view in ranks.views}) > 1:
            yield from modes
            return  # one follows from the other
        for group in dict.fromkeys(calls.key for view in ranks.views for calls in view.calls):
            calls = sequences_of(ranks.views, group)
            found = self._order(calls, layers) or self._ends(calls, layers, views)
            if found is not None:
                yield found

    def _modes(self, views: Sequence[RankView], layers: _Layers) -> Iterator[Finding]:
        """Of models that all ranks look at together: flags that differ."""
        training = [view.rank for view in views if view.is_together and not view.is_evaluating]
        differing: dict[str, tuple[list[int], list[int]]] = {}
        for name in dict.fromkeys(name for rank in training for name in layers[rank]):
            own = {rank: layers[rank][name] for rank in training if name in layers[rank]}
            asked = {rank for layer in own.values() for rank in layer.asks}
            train = [rank for rank, layer in own.items() if layer.is_training and rank in asked]
            rest = [rank for rank, layer in own.items() if not layer.is_training and rank in asked]
            if train and rest:
                differing[name] = train, rest
        if differing:
            name, (train, rest) = next(iter(differing.items()))
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            yield self.found(
                Severity.ERROR,
                f"{name}{more} in training mode on {ranks_named(train)}, in eval mode on "
                f"{ranks_named(rest)}: the next training step waits for a rank that does not come",
                differing,
                _MODES,
                layers=float(len(differing)),
                rank=float(train[0]),
                other_rank=float(rest[0]),
            )

    def _order(self, calls: Mapping[int, Calls], layers: _Layers) -> Finding | None:
        """The first call that is not of the same layer on all ranks."""
        first = max(own.count - len(own.last) for own in calls.values())
        for number in range(first, min(own.count for own in calls.values())):
            names: dict[str, list[int]] = defaultdict(list)
            for rank, own in calls.items():
                names[own.at(number) or ""].append(rank)
            if len(names) > 1:
                name = max(names, key=lambda name: _usual(name, number, calls))
                other = next(each for each in names if each != name)
                ahead, behind = names[name], names[other]
                counts = {rank: calls[rank].counts.get(name, 0) for rank in (*ahead, *behind)}
                if len(set(counts.values())) == 1:
                    return self._crossed(number, name, ahead, other, behind)
                if any(not _is_training(layers[rank].get(name)) for rank in behind):
                    return self._found(name, counts, ", where it is in eval mode", _MODES)
                return self._found(name, counts, f", which went on to {other}", _BRANCHES)
        return None

    def _ends(
        self, calls: Mapping[int, Calls], layers: _Layers, views: Mapping[int, RankView]
    ) -> Finding | None:
        """A call that some ranks wait in, and that others will certainly never come to."""
        fewest = min(own.count for own in calls.values())
        ahead = [rank for rank, own in calls.items() if own.count > fewest]
        if not ahead or all(views[rank].status == 0 for rank in ahead):
            return None  # nobody waited
        name = calls[ahead[0]].at(fewest) or calls[ahead[0]].last[0]
        behind = [rank for rank, own in calls.items() if own.count == fewest]
        for ranks, why, fix in (
            ([r for r in behind if _learned_in_eval(layers[r].get(name))], _IN_EVAL, _MODES),
            ([r for r in behind if views[r].is_together], " in one pass", _BRANCHES),
            ([r for r in behind if views[r].status == 0], _ENDED, _LOADERS),
        ):
            if ranks:
                counts = {rank: calls[rank].counts.get(name, 0) for rank in (*ahead, *ranks)}
                few = why is _ENDED and len(ranks) > 1
                return self._found(name, counts, why.replace("has", "have") if few else why, fix)
        return None

    def _crossed(
        self, number: int, name: str, ahead: list[int], other: str, behind: list[int]
    ) -> Finding:
        return self.found(
            Severity.ERROR,
            f"training-mode call {number + 1:,} of layers that synchronize is of {name} on "
            f"{ranks_named(ahead)}, of {other} on {ranks_named(behind)}",
            [name, other],
            _BRANCHES,
            call=number + 1.0,
            rank=float(ahead[0]),
            other_rank=float(behind[0]),
        )

    def _found(
        self,
        name: str,
        counts: Mapping[int, int],
        why: str,
        fix: str,
    ) -> Finding:
        by_count: dict[int, list[int]] = defaultdict(list)
        for rank, number in counts.items():
            by_count[number].append(rank)
        (most, ahead), *_, (fewest, behind) = sorted(by_count.items(), reverse=True)
        return self.found(
            Severity.ERROR,
            f"{name} was called {_times(most)} in training mode on {ranks_named(ahead)}, "
            f"{_times(fewest)} on {ranks_named(behind)}{why}",
            [name],
            fix,
            calls=float(most),
            other_calls=float(fewest),
            rank=float(ahead[0]),
            other_rank=float(behind[0]),
        )


_Layers = Mapping[int, Mapping[str, LayerView]]

_IN_EVAL = ", where it is in eval mode and learns"
_ENDED = ", which has ended"
_MODES = "train() or eval() on all ranks alike"
_BRANCHES = "take a branch on all ranks or on none: decide by what is the same on all of them"
_LOADERS = "as many batches on each rank: DistributedSampler(dataset), or drop_last=True"


def _is_training(layer: LayerView | None) -> bool:
    return layer is None or layer.is_training


def _learned_in_eval(layer: LayerView | None) -> bool:
    return layer is not None and not layer.is_training and layer.learned_in_eval > 0


def _usual(name: str, number: int, calls: Mapping[int, Calls]) -> tuple[int, int]:
    """How often a layer's call followed the one before this; on how many ranks it does now."""
    followed = sum(
        own.at(k) == name and own.at(k - 1) == own.at(number - 1)
        for own in calls.values()
        for k in range(max(1, number - len(own.last)), number)
    )
    return followed, sum(own.at(number) == name for own in calls.values())


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n:,} times"

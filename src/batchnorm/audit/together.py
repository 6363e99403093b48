"""An audit that several ranks do together, each with its own batches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.audit.finding import Report, ranks_named
from batchnorm.audit.gathering import LIMIT, NoBatchesError
from batchnorm.audit.merging import merged
from batchnorm.audit.rank_view import (
    Calls,
    LayerView,
    RankView,
    RankViews,
    Statistics,
    digest,
    sequences_of,
    told,
)
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules.bn112_ranks_differ import disagreements
from batchnorm.audit.selection import Selection
from batchnorm.audit.sync_log import SyncLog
from batchnorm.audit.synchronizing import asked, is_sharded, keep_apart, ranks_of
from batchnorm.audit.wire import (
    TELLING,
    Note,
    packed,
    packed_statistics,
    unpacked,
    unpacked_statistics,
)
from batchnorm.models.calling import Forward, call, set_training
from batchnorm.models.norms import TorchBatchNorm, batch_norms
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.ranks import Ranks
from batchnorm.ranks.store import Board
from batchnorm.statistics import Sync

__all__ = ["audit_together", "refuse_to_wait"]


Look = Callable[[list[Any] | None], Report]
"""What one rank finds with some batches, or with none."""


def audit_together(
    model: nn.Module,
    batches: Iterable[Any] | None,
    forward: Forward | None,
    look: Look,
    group: dist.ProcessGroup,
    wait: float,
    rules: Iterable[type[Rule]],
    selection: Selection,
) -> Report:
    """What all ranks of a group find, the same on each; see `audit`.

    They meet twice in the group's store, before batches are run and after, and wait no longer
    than `wait` seconds for who comes to the first. Where they are out of step where they
    synchronize (BN114), no batch is run: they would wait for each other in it.

    Raises what `look` raises on its rank and `RuntimeError` on the others; `TimeoutError` where a
    rank does not come; `ValueError` where layers ask ranks outside of the group.
    """
    ranks, board = Ranks(group), _board(group)
    data: list[Any] | None = None

    def begin() -> Note:
        nonlocal data
        _check_inside(model, group)
        if batches is not None:
            data = _first(model, batches)
        view = _view(model, () if data is None else _calls(model, data[0], forward))
        return Note(view, Report((), 0, len(data or ()), ()))

    notes = _meet(board, "start", wait, begin)
    views, numbers = [note.view for note in notes], [note.report.calls for note in notes]
    if 0 in numbers and any(numbers):
        raise ValueError("audit needs batches on all ranks of the group, or on none of them")
    if not _in_step(views):
        data = None
    elif is_sharded(model) or any(map(asked, model.modules())):
        data = None if data is None else data[: min(numbers)]  # each a batch of all ranks
    needed = {name for each in disagreements(views) for name in each.digests.values()}

    def end() -> Note:
        if board.rank < TELLING:
            board.pin("statistics", packed_statistics(_statistics(model, needed)))
        found.append(look(data))
        return Note(views[board.rank], found[0])

    found: list[Report] = []
    # one that runs its batches slowly is waited for: it has come, and the group has a limit
    notes = _meet(board, "end", _limit(group, wait), end)
    report = None
    with ranks.together():
        if board.rank == 0:
            reports = {note.view.rank: note.report for note in notes} | {views[0].rank: found[0]}
            views_of_all = RankViews(len(views), views, _told(board, needed))
            report = merged(reports, views[0].rank, views_of_all, rules, selection)
    report = ranks.gather(report)[0]
    assert report is not None
    return report


def refuse_to_wait(model: nn.Module) -> None:
    """Raise `ValueError` where one rank alone would wait for others in a training-mode pass."""
    trains = any(module.training for module in model.modules())
    waiting = {
        path: sync
        for path, layer in batch_norms(model).items()
        if (sync := asked(layer)) is not None and (layer.training or not trains)
    }
    together = "call audit on all of them, with group=torch.distributed.group.WORLD"
    if waiting:
        path, sync = next(iter(waiting.items()))
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        raise ValueError(
            f"{path!r}{more} would wait for {ranks_named(ranks_of(sync))}, with which it "
            f"normalizes in training mode: {together}"
        )
    if is_sharded(model):
        raise ValueError(f"the ranks hold a part of the model's parameters each: {together}")


_numbers: Counter[str] = Counter()  # of audits, by group


def _board(group: dist.ProcessGroup) -> Board:
    name = str(getattr(group, "group_name", ""))
    _numbers[name] += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Board.of_group(group, f"audit/{attempt}/{_numbers[name]}")


def _meet(board: Board, name: str, wait: float, make: Callable[[], Note]) -> list[Note]:
    """All ranks' notes; raises `RuntimeError` where another rank failed to make its own."""
    try:
        mine = make()
    except Exception as error:
        board.fail(name, f"{type(error).__name__}: {error}")
        raise
    return [unpacked(note) for note in board.meet(name, packed(mine), wait)]


def _limit(group: dist.ProcessGroup, wait: float) -> float:
    """The group's own time limit, where it tells one; none is shorter than `wait`."""
    options = getattr(group, "options", None)
    limit = getattr(options, "_timeout", None)
    return wait if limit is None else max(wait, limit.total_seconds())


def _first(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    with left_as_it_was(model):  # a loader draws random numbers
        data = list(islice(batches, LIMIT))
    if not data:
        raise NoBatchesError("there are no batches to look at; the iterable was empty")
    return data


def _check_inside(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise `ValueError` where layers ask ranks that are not here."""
    here = set(dist.get_process_group_ranks(group))
    for path, layer in batch_norms(model).items():
        sync = asked(layer)
        if sync is not None and not here.issuperset(ranks_of(sync)):
            raise ValueError(
                f"{path!r} normalizes with {ranks_named(ranks_of(sync))} in training mode, and the "
                f"group has {ranks_named(here)} alone; give one that has them all"
            )


def _in_step(views: Sequence[RankView]) -> bool:
    """Whether all ranks would ask each other in the same order."""
    groups = {calls.key for view in views for calls in view.calls}
    return all(
        len({calls.last for calls in sequences_of(views, group).values()}) == 1 for group in groups
    )


def _view(model: nn.Module, calls: tuple[Calls, ...]) -> RankView:
    """What the others are told of the model as it is."""
    written = {
        layer
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers
        for layer in module.modules()
    }
    layers = []
    for path, layer in batch_norms(model).items():
        sync = asked(layer)
        layers.append(
            LayerView(
                path or type(layer).__name__,
                path,
                layer.eps,
                weights=digest(layer.weight),
                held=told(_running(layer))[0],
                is_broadcast=layer in written,
                asks=() if sync is None else ranks_of(sync),
                is_training=layer.training,
            )
        )
    return RankView(
        dist.get_rank(),
        tuple(layers),
        calls,
        status=None,
        is_together=True,
        is_evaluating=not any(module.training for module in model.modules()),
    )


def _calls(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Calls, ...]:
    """Which layers would ask other ranks in a training-mode pass, in their order; none does."""
    if is_sharded(model):
        return ()  # it cannot run but on all ranks
    log = SyncLog()
    with left_as_it_was(model):
        keep_apart(model)
        set_training(model)
        for path, layer in batch_norms(model).items():
            sync = asked(layer)
            if sync is not None and layer.training:
                layer.eval()
                layer.register_forward_pre_hook(partial(_note, log, sync, path))
        (forward or call)(model, batch)
    return log.calls()


def _note(log: SyncLog, sync: Sync, path: str, *_: object) -> None:
    log.note(sync, path)


def _running(layer: TorchBatchNorm) -> Statistics | None:
    mean, var = layer.running_mean, layer.running_var
    return None if mean is None or var is None else (mean, var)


def _statistics(model: nn.Module, needed: set[str]) -> dict[str, Statistics]:
    pairs = dict(told(_running(layer)) for layer in batch_norms(model).values())
    return {name: pair for name, pair in pairs.items() if name in needed and pair}


def _told(board: Board, needed: set[str]) -> dict[str, Statistics]:
    """The statistics that ranks told of layers that differ."""
    found: dict[str, Statistics] = {}
    if needed:
        for rank in range(min(board.size, TELLING)):
            data = board.read("statistics", rank)
            found |= {} if data is None else unpacked_statistics(data)
    return found

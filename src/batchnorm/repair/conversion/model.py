"""Convert the norms of a model: see `convert`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.models.calling import Forward
from batchnorm.models.comparison import difference, tolerance
from batchnorm.models.compiled import original
from batchnorm.models.norms import Where, is_meant, is_norm
from batchnorm.repair.accumulation import is_accumulated
from batchnorm.repair.adaptation.statistics import is_adapted
from batchnorm.repair.conversion.biases import biased
from batchnorm.repair.conversion.observation import Observation
from batchnorm.repair.conversion.optimizer import release
from batchnorm.repair.conversion.order import Order, is_lazy_model
from batchnorm.repair.conversion.result import Conversion
from batchnorm.repair.conversion.target import LOSSLESS, OURS_TOO, TARGETS, Options
from batchnorm.repair.conversion.work import Work
from batchnorm.statistics import Statistics, Sync

__all__ = ["convert"]

_DROP_BIAS = "drop_bias"


def convert(
    model: nn.Module,
    *,
    to: str | Statistics,
    where: Where = None,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any | None = None,
    forward: Forward | None = None,
    fuse: bool = False,
    groups: int | None = None,
    process_group: Any | None = None,
) -> Conversion:
    """Make a model's batch norms layers of another kind, where they stand.

    ```python
    convert(model, to="batchnorm")              # torch.nn's become this library's
    convert(model, to=Ghost(32))                # with a policy
    convert(model, to="batchnorm", fuse=True)   # and take over the ReLUs behind them
    convert(model, to="torch")                  # and back
    convert(model, to="sync")                   # with the statistics of all ranks
    convert(model, to="group_norm").undo()
    convert(model, to="drop_bias", optimizer=optimizer)
    ```

    Each layer stays the same object with another class, so that hooks, references to it and the
    parameters that an optimizer holds stay; mode, ε, momentum, counter, dtype, device and
    what its user put on it do too. Among batch norms nothing is lost: a layer remembers what it
    was first, in copies and pickles too, and has that class and state_dict again when it is
    converted back.

    - `to`: what to make of them.
      - "batchnorm": this library's, and with a policy such as `Ghost(32)` those; torchvision's
        FrozenBatchNorm2d, and what holds and computes the same, frozen; timm's BatchNormAct2d
        with its activation; `torch.nn.SyncBatchNorm`, over the same ranks as before, with
        `Sync()`, which is `Batch()` where there is one process.
      - "sync": this library's with `Sync()`, on any device; those that share statistics already
        do so with the same ranks.
      - "torch": `torch.nn`'s BatchNorm1d, 2d or 3d; "torch_sync": `torch.nn.SyncBatchNorm`, which
        trains on GPUs alone.
      - "original": what each was before it was converted first.
      - "group_norm": `torch.nn.GroupNorm`; "instance_norm": `torch.nn.InstanceNorm`;
        "layer_norm" and "rms_norm": `torch.nn`'s over the channels of each position, as in
        ConvNeXt (for all positions of a sample at once, "group_norm" with `groups=1`);
        "identity": nothing. They keep γ, β and ε as far as they have them. A trained model
        needs fine-tuning then.
      - "drop_bias": no batch norms, but the biases of convolutions and linear layers that every
        batch norm behind them takes out again; running means are corrected.
    - `where`: which layers, by path; see `Where`. By default all. Of "drop_bias", the biased ones.
    - `optimizer`: one that holds the model's parameters; those that the model has no more leave
      it. All others stay the same objects.
    - `example`: an input of the model. With it outputs are compared, and what the
      modules do not tell is seen: how many dimensions a SyncBatchNorm's input has, or the order
      of operations that torch.fx cannot trace.
    - `forward`: how to call the model with the example, if not as `model(example)`.
    - `fuse`: with this library's layers, have each take over the activation module behind it,
      where that takes nothing else. Calls of functions are no modules and stay.
    - `groups`: of a GroupNorm, 32 if not given: the largest divisor of the channels up to that
      which leaves at least two channels in a group.
    - `process_group`: the ranks, of "sync" and "torch_sync"; by default all.

    Returns what was done. A layer that does what its class does not tell, a subclass with a forward
    of its own say, is left as it is, with the reason. On any failure so is the whole model.

    Raises `ValueError` for an unknown `to`, an option of another target, a `where` that means no
    layer, and where only an example could tell; `TypeError` for what is no module, policy or
    optimizer; `RuntimeError` where outputs on the example differ by more than rounding though
    nothing should be lost.
    """
    name, options = _asked(to, fuse, groups, process_group)
    _check(model, optimizer)
    if name not in (*LOSSLESS, _DROP_BIAS) and (is_adapted(model) or is_accumulated(model)):
        raise ValueError(
            f"hooks of adapt or accumulate on the model ask for batch norms, which {name} has not; "
            "remove() them before converting"
        )
    model = original(model)
    # a pass would make a lazy layer an ordinary one
    watched = example is not None and not is_lazy_model(model)
    norms = [module for module in model.modules() if is_norm(module)]
    seen = Observation.of(model, example, forward, norms) if watched else None
    before = list(model.parameters())
    with ExitStack() as undo:
        work = Work(model, None if seen is None else seen.shapes, undo)
        if name == _DROP_BIAS:
            meant = _meant(model, where, biased, "biased layers")
            work.drop_biases(meant, example, forward, is_named=where is not None)
        else:
            meant = _meant(model, where, is_norm, "batch norms")
            work.convert(meant, name, options)
            if fuse:
                work.fuse(Order(model, example, forward))
            work.apply()
        if optimizer is not None:
            after = {id(parameter) for parameter in model.parameters()}
            release(optimizer, [p for p in before if id(p) not in after], undo)
        differs = None
        if seen is not None:
            now = Observation.of(model, example, forward, ())
            differs = difference(now.outputs, seen.outputs)
            if name in (*LOSSLESS, _DROP_BIAS):
                _check_lossless(to, differs, seen)
        sizes = (_count(before), _count(list(model.parameters())))
        return work.result(str(to), sizes, differs, undo.pop_all())


def _check(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise for what is of another type."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"convert takes a torch.nn.Module that is not scripted, got {type(model).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")


def _check_lossless(to: str | Statistics, differs: float, seen: Observation) -> None:
    """Raise where outputs differ by more than rounding makes of them in a deep network."""
    if not differs <= min(tolerance(seen.outputs, least=0.0, resolutions=1e4), 0.5):
        raise RuntimeError(
            f"converting to {to} changes the outputs on the example by {differs:.2g} of the "
            "largest, more than rounding does; the model is as it was. A forward that reads its "
            "layers' attributes, or calls different ones from time to time, can do that: leave "
            "those layers out with where=..."
        )


def _asked(
    to: str | Statistics, fuse: bool, groups: int | None, process_group: Any | None
) -> tuple[str, Options]:
    """The name of the target, and what is to be known of it."""
    if isinstance(to, Statistics):
        name, options = "batchnorm", Options(to)
    elif isinstance(to, str) and to in (*TARGETS, _DROP_BIAS):
        name, options = to, Options()
    elif isinstance(to, str):
        names = ", ".join(map(repr, (*TARGETS, _DROP_BIAS)))
        raise ValueError(f"to must be one of {names}, or a policy such as Ghost(32); got {to!r}")
    else:
        raise TypeError(
            f"to must be a name such as 'torch' or a policy such as Ghost(32); got {to!r}"
        )
    for option, given, targets in (
        ("fuse", fuse or None, OURS_TOO),
        ("groups", groups, ("group_norm",)),
        ("process_group", process_group, ("sync", "torch_sync")),
    ):
        if given is not None and name not in targets:
            of = " and ".join(f"to={target!r}" for target in targets)
            raise ValueError(f"{option}= is an option of {of}, got it with to={to!r}")
    if name == "sync":
        Sync(process_group)  # raises for what is no group
    if groups is not None and groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    return name, options._replace(groups=groups or options.groups, process_group=process_group)


def _meant(
    model: nn.Module, where: Where, is_one: Callable[[nn.Module], bool], what: str
) -> dict[nn.Module, str]:
    """The modules that are meant, each once, by the first of its paths."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_one(module):
            paths.setdefault(module, []).append(path)
    meant = {m: at[0] for m, at in paths.items() if any(is_meant(path, m, where) for path in at)}
    if where is not None and paths and not meant:
        known = ", ".join(repr(at[0]) for at in list(paths.values())[:6])
        raise ValueError(f"where={where!r} means none of the model's {len(paths)} {what}: {known}")
    return meant


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if not is_lazy(p))

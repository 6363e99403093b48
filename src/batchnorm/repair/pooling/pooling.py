"""Micro-batches as one batch, exactly: they meet at every batch norm layer, both ways."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.functional import track
from batchnorm.functional.checks import check_input
from batchnorm.functional.recipe import observer
from batchnorm.kernels import IDENTITY
from batchnorm.layers import BatchNorm
from batchnorm.models.calling import Forward, call
from batchnorm.models.compiled import is_compiled
from batchnorm.models.norms import TorchBatchNorm, batch_norms, has_usual_forward, sync_of
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.ranks import Caller, Peers, caller_of, step
from batchnorm.repair.accumulation import is_accumulated, is_recomputation
from batchnorm.repair.pooling.lockstep import ask, in_lockstep
from batchnorm.repair.pooling.operation import Part, normalize_together
from batchnorm.repair.table import shown
from batchnorm.statistics import Batch, Running, Statistics, Sync, Untracked

__all__ = ["pooled_forward"]


def pooled_forward(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> list[Any]:
    """What `model` gives for each of several micro-batches, normalized as the one that they make.

    ```python
    outputs = pooled_forward(model, [x for x, _ in micro])            # one for each
    losses = [criterion(y, t) for y, (_, t) in zip(outputs, micro)]   # means over micro-batches
    (sum(losses) / len(losses)).backward()                            # once, for all of them
    optimizer.step()
    ```

    The micro-batches run through the model side by side, one at a time, and meet at every batch
    norm layer: their moments merge, and all are normalized by

    n = Σnᵢ,  mean = Σnᵢ·meanᵢ / n,  var = Σ(m2ᵢ + nᵢ·(meanᵢ − mean)²) / n

    with gradients through both. Outputs, gradients, running statistics and counters are those of
    one forward pass of `torch.cat(batches)`, to rounding; and of images of different sizes, which
    nobody can stack, those of the batch that they would make. Each layer tracks it once. Layers
    that share statistics with other ranks, by statistics=Sync() or as SyncBatchNorm, pool the
    micro-batches of all of them, by one exchange each way; all ranks call this then.

    It is for such batches: it saves no memory by itself. Each layer's gradient asks for sums over
    all micro-batches, so that all of them are kept until the backward pass, as the pooled batch
    is. What makes room for that one does so here: `torch.autograd.graph.save_on_cpu()`,
    `rematerialize`, and checkpoints around stages (not within them, where a micro-batch would be
    computed again alone):

    ```python
    for stage in model:                             # a torch.nn.Sequential; x: the micro-batches
        x = checkpoint(pooled_forward, stage, x, use_reentrant=False)
    ```

    In a trial on the CPU, ten convolutions with fused norms on 8 micro-batches of 8 images, the
    peak was that of the one batch, less than half of it with a checkpoint around each of five
    stages, and nearly seven times that of plain accumulation.

    - `batches`: the micro-batches; their outputs are to be weighted as the loss asks. For the loss
      of the pooled batch, a mean, weight each one's mean by its share of the samples.
    - `forward`: how to call the model with one of them; by default with the batch itself, of a
      tuple or list the first entry, of a dictionary by name.

    Returns the outputs, in the order of the batches.

    Raises `TypeError` for what is no module, and for layers with a forward of their own or with
    another policy than `Batch()`, `Running()` or `Sync()`; `ValueError` for no batches, and for a
    model that is compiled, lazy or accumulated; `RuntimeError` where micro-batches take different
    paths through the model, or a checkpoint lies within; `SyncError` where ranks do. After these
    and any other exception, the model's buffers and attributes are what they were.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", eq. 2.1; Ioffe & Szegedy 2015, "Batch normalization", algorithm 1.
    """
    batches = list(batches)
    norms = _checked(model, batches)
    run = forward or call
    with undone_on_failure(model), _meeting(norms):
        return in_lockstep([partial(run, model, batch) for batch in batches], _meet)


@dataclass(frozen=True)
class _Call:
    """A layer's call with one of the micro-batches."""

    path: str
    norm: TorchBatchNorm
    caller: Caller  # the layer, as other ranks know it
    part: Part
    records: bool  # whether autograd does, in the lane


@contextmanager
def _meeting(norms: dict[str, TorchBatchNorm]) -> Iterator[None]:
    """Let the layers' calls ask for all micro-batches."""
    try:
        for path, norm in norms.items():
            vars(norm)["forward"] = partial(_forward, path, norm)
        yield
    finally:
        for norm in norms.values():
            vars(norm).pop("forward", None)


def _forward(path: str, norm: TorchBatchNorm, input: Tensor, **options: Tensor | None) -> Tensor:
    """In place of a layer's own forward."""
    if not _uses_batch(norm):
        y: Tensor = type(norm).forward(norm, input, **options)
        return y
    if _is_checkpointed():
        raise RuntimeError(
            f"{path} is called within an activation checkpoint, which would compute it again for "
            "one micro-batch alone; put the checkpoint around pooled_forward, stage by stage"
        )
    norm._check_input_dim(input)
    part = Part(input, **options)
    held = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean")}
    check_input(input, residual=part.residual, mask=part.mask, **held)
    y, how = ask(_Call(path, norm, caller_of(norm), part, torch.is_grad_enabled()))
    if observer.notify is not None and y.requires_grad:  # rematerialize
        observer.notify(y, how)
    return y


def _meet(calls: list[_Call | None]) -> list[Any]:
    """Normalize the parts of one layer's call together, and track them."""
    paths = ["the end" if each is None else each.path for each in calls]
    first = calls[0]
    if first is None or len(set(paths)) > 1:
        raise RuntimeError(
            f"the micro-batches take different paths through the model: they are at {paths}. "
            "Batches that meet at every layer must go the same way; draw random depth before"
        )
    parts = [each.part for each in calls if each is not None]
    norm, xs = first.norm, [part.x for part in parts]
    sync = sync_of(norm) if norm.training else None
    peers = None if sync is None or sync.size == 1 else Peers(sync.process_group, first.caller)
    _check_fit(first.path, xs)
    if peers is None:
        _check_has_variance(first.path, xs, sum(map(_values, xs)))
    if norm.eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {norm.eps}")
    act = norm.act if isinstance(norm, BatchNorm) else IDENTITY
    with torch.set_grad_enabled(first.records):
        outputs, how = normalize_together(parts, norm.weight, norm.bias, norm.eps, act, peers)
    pooled = how[0].moments
    if peers is not None and sum(map(_values, xs)) < 2:  # no other rank can be short of them
        _check_has_variance(first.path, xs, int(pooled.count[0]))
    if norm.running_mean is not None and norm.running_var is not None and _tracks(norm):
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if peers is not None:
            step.keep(*running)
        track(*running, pooled, norm.momentum)
    return list(zip(outputs, how, strict=True))


def _uses_batch(norm: TorchBatchNorm) -> bool:
    if isinstance(norm, BatchNorm):
        return not isinstance(norm._policy(), Running)
    return norm.training or norm.running_mean is None


def _tracks(norm: TorchBatchNorm) -> bool:
    untracked = isinstance(norm, BatchNorm) and isinstance(norm.statistics, Untracked)
    return norm.training and norm.track_running_stats and not untracked and not is_recomputation()


def _is_checkpointed() -> bool:
    """Whether a checkpoint is on this thread's stack; one around `pooled_forward` is not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def _check_fit(path: str, xs: Sequence[Tensor]) -> None:
    """Raise unless the parts of a batch fit each other."""
    kinds = {(x.shape[1], x.dtype, x.device) for x in xs}
    if len(kinds) > 1:
        raise ValueError(
            f"the micro-batches at {shown(path)} must have one number of channels, dtype and "
            "device, got "
            + "; ".join(f"{c} channels of {dtype} on {device}" for c, dtype, device in kinds)
        )


def _values(x: Tensor) -> int:
    """Per channel."""
    return x.shape[0] * x.shape[2:].numel()


def _check_has_variance(path: str, xs: Sequence[Tensor], count: int) -> None:
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(xs[0].shape)} at {shown(path)} in all micro-batches together"
        )


def _checked(model: nn.Module, batches: Sequence[Any]) -> dict[str, TorchBatchNorm]:
    """The layers of a model that micro-batches can meet at."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"pooled_forward takes a torch.nn.Module, got {type(model).__name__}")
    if not batches:
        raise ValueError("pooled_forward needs at least one micro-batch, got none")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise RuntimeError("pooled_forward runs in threads, which no compiler or transform follows")
    if any(is_compiled(m) or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            "pooled_forward stops within the forward pass, which a compiled model cannot; give it "
            "the model before torch.compile"
        )
    if is_accumulated(model):
        raise ValueError(
            "pooled_forward tracks the pooled batch itself, and the model is accumulated; remove() "
            "the accumulation first"
        )
    norms = batch_norms(model)
    for path, norm in norms.items():
        _check_layer(path, norm)
    return norms


def _check_layer(path: str, norm: TorchBatchNorm) -> None:
    if any(is_lazy(tensor) for tensor in (*norm.parameters(), *norm.buffers())):
        raise ValueError(f"{path} is lazy and has no shape yet; call the model with a batch first")
    if not has_usual_forward(norm):
        raise TypeError(
            f"{path} is a {type(norm).__name__} with a forward of its own, of which nobody knows "
            "what it does beside normalizing; use torch.nn's layer or batchnorm's"
        )
    if isinstance(norm, BatchNorm) and not _is_pooled(norm.statistics):
        raise TypeError(
            f"{path} normalizes with statistics={norm.statistics}; pooled_forward knows Batch(), "
            "Sync() and Running(). For the running statistics alone use accumulate(model, steps)"
        )


def _is_pooled(policy: Statistics) -> bool:
    policy = policy.policy if isinstance(policy, Untracked) else policy
    if isinstance(policy, Sync):  # of whatever ranks
        return policy.slices is None
    return policy in (Batch(), Running())

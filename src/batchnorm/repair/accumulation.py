"""Running statistics under gradient accumulation: one update for several micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from types import FrameType
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from batchnorm.functional import moments, track
from batchnorm.layers import BatchNorm
from batchnorm.models.compiled import original
from batchnorm.models.frames import is_running
from batchnorm.models.norms import TorchBatchNorm, batch_norms, sync_of
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.moments import Moments
from batchnorm.ranks import UNKNOWN, Caller, Peers
from batchnorm.repair.table import counted, shown, table

__all__ = ["Accumulation", "accumulate", "is_accumulated", "is_recomputation"]

_P = ParamSpec("_P")


def accumulate(model: nn.Module, steps: int) -> Accumulation:
    """Let the running statistics take up `steps` micro-batches as the one batch that they make.

    Gradient accumulation adds up gradients, and knows nothing of batch norm: running statistics
    move once a micro-batch, so that they forget `steps` times as fast, and the variance that they
    learn is the mean of the micro-batches' variances, which misses how far their means lie apart.
    Here the moments of each pass are gathered, and at the last one merged,

    n = Σnᵢ,  mean = Σnᵢ·meanᵢ / n,  m2 = Σ(m2ᵢ + nᵢ·(meanᵢ − mean)²)

    and tracked once: the running statistics and the counter are those that one forward pass of
    the pooled batch leaves, for micro-batches of any sizes.

    ```python
    accumulation = accumulate(model, 4)           # from now on; .remove() takes it off
    for i, (x, target) in enumerate(loader):
        (criterion(model(x), target) / 4).backward()
        if i % 4 == 3:
            optimizer.step(); optimizer.zero_grad()
    accumulation.step()                           # the rest of an epoch, where one remains
    print(accumulation)
    ```

    Outputs and gradients are as before: each micro-batch is normalized by its own statistics, so
    deeper layers' inputs, and with them their moments, are not those of a pooled batch to the
    last digit. `pooled_forward` normalizes by the pooled ones.

    A pass is a forward of `model` in which layers track a batch: in training mode, of layers that
    are not frozen. What a checkpoint computes again counts once, `torch.nn`'s layers included; a
    forward that raises leaves nothing. Of a layer that is called several times in a pass, the
    first calls are pooled, then the second ones, as in the pooled batch. A micro-batch with
    non-finite statistics skips the whole update, as such a batch does in this library's layers.
    `SyncBatchNorm` and layers with statistics=Sync() pool over the ranks too, which all make as
    many passes then.

    `torch.nn`'s layers take one more sweep over their inputs. `torch.compile` breaks its graph at
    each layer, and compiles anew what it had compiled.

    - `model`: what the training loop calls, or a part of it, through which its layers are called.
    - `steps`: how many micro-batches make a batch, k.

    Returns the handle, which is a context manager as well and prints as a table.

    Raises `TypeError` for what is no module or no whole number; `ValueError` for `steps` below 1,
    and for a model without running statistics, or one that is accumulated already.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", eq. 2.1.
    """
    _check(model, steps)
    return Accumulation(original(model), steps)


def _in_python(method: Callable[_P, None]) -> Callable[_P, None]:
    """A method that a compiler leaves to Python: what it does differs from call to call."""

    @wraps(method)
    def left(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if torch.compiler.is_compiling():
            torch._dynamo.disable(method)(*args, **kwargs)
        else:
            method(*args, **kwargs)

    return left


class Accumulation:
    """The hooks that `accumulate` put on a model; leaving it as a context takes them off.

    - `steps`: how many passes make an update.
    - `passes`: how many were seen.
    - `updates`: how many updates were made.
    - `pending`: how many passes were gathered since the last.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        self.passes = self.updates = self.pending = 0
        self._layers = {norm: _Layer(path) for path, norm in _with_statistics(model).items()}
        self._forwards: list[FrameType] = []  # of the model, that run; within each other
        self._handles = []
        for norm in self._layers:
            self._handles += [
                norm.register_forward_pre_hook(self._before),
                norm.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        # last, for the model may be a layer itself, whose call is over before the pass is
        self._handles += [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._succeed),
            model.register_forward_hook(self._end, always_call=True),
        ]
        _compile_anew()

    def step(self) -> None:
        """Track what was gathered, of fewer passes than `steps` too; nothing where there is none.

        For the last micro-batches of an epoch, where the optimizer takes its step.
        """
        if not self.pending:
            return
        with undone_on_failure(nn.ModuleList(self._layers)):
            for norm, layer in self._layers.items():
                for pool in layer.pools:
                    pool.track(norm, layer.path)
        for layer in self._layers.values():
            layer.spread = [pool.spread() for pool in layer.pools] or layer.spread
            layer.pools = []
        self.pending = 0
        self.updates += 1

    def remove(self) -> None:
        """Track what was gathered since the last update, and take the hooks off."""
        self._take_off()
        self.step()

    def __enter__(self) -> Accumulation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the hooks; after an exception what was gathered is dropped."""
        self._take_off()
        if kind is None:
            self.step()

    def __repr__(self) -> str:
        title = (
            f"Accumulation: {counted(len(self._layers), 'layer')}, one update for {self.steps} "
            f"passes; {counted(self.passes, 'pass', 'passes')} seen, "
            f"{counted(self.updates, 'update')} made"
        )
        rows = [
            [shown(layer.path), layer.shown()] for layer in self._layers.values() if layer.spread
        ]
        return table(title, ["layer", "std of the batch to that of its parts"], rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": []}  # a copy of the model has none under way

    @_in_python
    def _begin(self, model: nn.Module, inputs: Any) -> None:
        # PyTorch does not tell of a forward that Ctrl-C ended
        self._forwards = [frame for frame in self._forwards if is_running(frame)]
        if not self._forwards:
            for layer in self._layers.values():
                layer.calls = []
        self._forwards.append(_call_under_way())

    @_in_python
    def _succeed(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """Pool what a pass gathered: called where the forward did not raise."""
        if len(self._forwards) != 1 or not any(layer.calls for layer in self._layers.values()):
            return
        for layer in self._layers.values():
            layer.pool()
        self.passes += 1
        self.pending += 1
        if self.pending >= self.steps:
            self.step()

    @_in_python
    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._forwards:
            self._forwards.pop()

    @_in_python
    def _before(self, norm: TorchBatchNorm, inputs: Any) -> None:
        """Ours compute their moments, and hand them over where they would track them."""
        layer = self._layers.get(norm)
        if layer is not None:
            layer.put_back(norm)  # what a call left that Ctrl-C ended
        if not (norm.training and norm.track_running_stats):
            return
        if layer is None:
            raise RuntimeError(
                f"accumulate gathers from the layers that it was given, and this "
                f"{type(norm).__name__} is a copy of one: torch.nn.DataParallel makes such at "
                "every step. Use DistributedDataParallel, or remove() it before copying layers"
            )
        if isinstance(norm, BatchNorm):
            vars(norm)["_track"] = partial(self._gather, layer)
        else:
            layer.version, layer.is_off = _version(norm), True
            norm.track_running_stats = False

    @_in_python
    def _after(self, norm: TorchBatchNorm, inputs: Any, named: Any, output: Any) -> None:
        """The moments of torch.nn's layers take one more sweep."""
        layer = self._layers.get(norm)
        if layer is None:
            return
        tracks = layer.is_off
        layer.put_back(norm)
        if not tracks or output is None or is_recomputation():
            return
        if _version(norm) != layer.version:
            raise RuntimeError(
                f"{layer.path} moved its running statistics with track_running_stats=False: the "
                f"forward of {type(norm).__name__} does not look at it, so that accumulate cannot "
                "keep it from tracking each micro-batch; use torch.nn's layer or batchnorm's"
            )
        x = next(iter((*inputs, *named.values())))
        self._gather(layer, None, moments(x.detach()), x)

    @_in_python
    def _gather(self, layer: _Layer, running: object, batch: Moments, input: Tensor) -> None:
        """Keep the moments of one call, in place of tracking them."""
        if not self._forwards:
            raise RuntimeError(
                f"{layer.path} was called in training mode outside of a forward of the model that "
                "accumulate was given, so that nobody knows which calls make a pass; give it the "
                "module that the training loop calls"
            )
        layer.calls.append(batch)

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        for norm, layer in self._layers.items():
            layer.put_back(norm)
        self._forwards = []
        _compile_anew()


@dataclass
class _Pool:
    """The moments of one call of a layer over the passes so far, and those passes' variances."""

    moments: Moments
    variances: Tensor  # (c,), their sum
    parts: int = 1

    @classmethod
    def of(cls, batch: Moments) -> _Pool:
        return cls(batch, batch.var(unbiased=True))

    def add(self, batch: Moments) -> None:
        self.moments = self.moments + batch
        self.variances = self.variances + batch.var(unbiased=True)
        self.parts += 1

    def track(self, norm: TorchBatchNorm, path: str) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        pooled = _over_ranks(norm, path, self.moments)
        track(norm.running_mean, norm.running_var, norm.num_batches_tracked, pooled, norm.momentum)

    def spread(self) -> Tensor:
        """The standard deviation of the pooled batch to what its parts have on average, (c,)."""
        return (self.moments.var(unbiased=True) * self.parts / self.variances).sqrt()


@dataclass
class _Layer:
    """What was gathered of a layer: of the pass under way, and of those before it."""

    path: str
    calls: list[Moments] = field(default_factory=list)
    pools: list[_Pool] = field(default_factory=list)
    spread: list[Tensor] = field(default_factory=list)  # at the last update, of each call
    is_off: bool = False  # its flag, while it is called
    version: int = 0  # of its running statistics then

    def pool(self) -> None:
        """Merge the calls of a pass into those of the passes before, in their order."""
        for i, batch in enumerate(self.calls):
            if i < len(self.pools):
                self.pools[i].add(batch)
            else:
                self.pools.append(_Pool.of(batch))
        self.calls = []

    def put_back(self, norm: TorchBatchNorm) -> None:
        """Take from the layer what its calls are given."""
        vars(norm).pop("_track", None)
        if self.is_off:
            norm.track_running_stats, self.is_off = True, False

    def shown(self) -> str:
        mean = torch.cat(self.spread).nanmean().item()
        return "–" if mean != mean else f"×{mean:.3f}"


def _over_ranks(norm: TorchBatchNorm, path: str, mine: Moments) -> Moments:
    """The moments of all ranks whose batches a layer normalizes together.

    This library's layers hand such over; of a SyncBatchNorm the ranks' own were gathered.
    """
    sync = None if isinstance(norm, BatchNorm) else sync_of(norm)
    if sync is None or sync.size == 1:
        return mine
    return Peers(sync.process_group, Caller(shown(path), UNKNOWN.tag)).merged(mine)


def _check(model: nn.Module, steps: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accumulate takes a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"accumulate needs a whole number of micro-batches, got steps={steps!r}")
    if steps < 1:
        raise ValueError(f"accumulate needs at least one micro-batch, got steps={steps}")
    if is_accumulated(model):
        raise ValueError(
            "the model, or a part of it, is accumulated already; remove() that accumulation first"
        )
    if not _with_statistics(model):
        raise ValueError(
            f"{type(model).__name__} has no batch norm layer with running statistics, so there "
            "is nothing to accumulate; scripted and exported models have none that hooks see"
        )


def is_accumulated(model: nn.Module) -> bool:
    """Whether an `Accumulation` gathers from layers of the model."""
    hooks = [hook for norm in batch_norms(model).values() for hook in norm._forward_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), Accumulation) for hook in hooks)


def _with_statistics(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The layers that have running statistics, by path."""
    return {p: norm for p, norm in batch_norms(model).items() if norm.running_mean is not None}


def _compile_anew() -> None:
    """Compiled code does not notice hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def is_recomputation() -> bool:
    """Whether a backward pass runs: a checkpoint's forward is computed again."""
    return torch._C._current_graph_task_id() != -1


def _call_under_way() -> FrameType:
    """The frame of the innermost module's call, which its hooks run in."""
    frame = current = sys._getframe(1)
    while frame.f_code is not nn.Module._call_impl.__code__:
        if frame.f_back is None:
            return current
        frame = frame.f_back
    return frame


def _version(norm: TorchBatchNorm) -> int:
    return 0 if norm.running_mean is None else norm.running_mean._version

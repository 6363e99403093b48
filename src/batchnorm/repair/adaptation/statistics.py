"""One layer normalizes with what it is given at inference, held to what it was trained with.

The layer itself computes y = γ·(x − mean_s)/√(var_s + ε) + β with its running statistics, the
source's. So its input is moved instead, to (x − mean)/r + mean_s with r = √((var + ε)/(var_s + ε)),
from which the layer computes what it would with `mean` and `var`. Nothing of the layer's changes,
so that nothing can be left behind, and what it fuses or a subclass adds goes on as it was.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from batchnorm.functional import moments
from batchnorm.kernels import accumulator, compute_dtype
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.moments import Moments
from batchnorm.repair.table import shown

__all__ = ["MAIN", "AdaptedLayer", "Cap", "CurrentStream", "LayerDrift", "Settings", "trains"]

MAIN = "main"


@dataclass(frozen=True)
class Cap:
    """How far from the source's statistics adapted ones may be, channel by channel.

    - `mean`: at most as many of the source's standard deviations.
    - `std`: the standard deviation at most so many times as large or small.

    It limits a batch before it is remembered, so that one broken frame does not stay for as long
    as the memory lasts, and the mixture that is used.

    Raises `ValueError` for a negative `mean` and a `std` below 1.
    """

    mean: int | float = 1.0
    std: int | float = 2.0

    def __post_init__(self) -> None:
        if not self.mean >= 0 or not self.std >= 1:
            raise ValueError(
                f"Cap needs mean >= 0, in standard deviations, and std >= 1, a ratio; got {self}"
            )


@dataclass(frozen=True)
class Settings:
    """What `adapt` was told of statistics; a memory of 0 is none."""

    prior: float
    memory: float
    cap: Cap | None


class CurrentStream(threading.local):
    """The stream that this thread's batches are from."""

    name = MAIN

    def __reduce__(self) -> tuple[type[CurrentStream], tuple[()]]:
        return CurrentStream, ()  # a copy of the model begins with the main stream


@dataclass(frozen=True)
class LayerDrift:
    """How far a layer normalizes from its running statistics in a stream.

    - `samples`: those that entered; `remembered`: for how many the stream counts now.
    - `mean`: distance of the mean in use from the running one, in running standard deviations
      (root mean square over channels).
    - `std`: ratio of the standard deviation in use to the running one (geometric mean).
    - `capped`: the part of all channels, over all calls, in which the cap held.
    - `skipped`: calls with values that were not finite, which did not enter.
    """

    path: str
    samples: int
    remembered: float
    mean: float
    std: float
    capped: float
    skipped: int


class _State(NamedTuple):
    """What a layer knows of a stream. All are tensors, so that nothing waits for a device."""

    target: Moments  # (c,) each
    remembered: Float[Tensor, ""]  # samples that `target` counts for
    samples: Int[Tensor, ""]
    calls: Int[Tensor, ""]
    skipped: Int[Tensor, ""]
    capped: Float[Tensor, ""]  # channels, as a part of all, summed over calls
    shift: Float[Tensor, " c"]  # in use, in running standard deviations
    ratio: Float[Tensor, " c"]


class _Source(NamedTuple):
    """What a layer was trained with."""

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]
    sigma: Float[Tensor, " c"]  # √(var + ε)
    eps: float

    @classmethod
    def of(cls, layer: TorchBatchNorm, x: Tensor) -> _Source:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        wide = (t.detach().to(accumulator(x)) for t in (layer.running_mean, layer.running_var))
        mean, var = wide
        return cls(mean, var, (var + layer.eps).sqrt(), layer.eps)

    def distance(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """How many standard deviations off, and how many times as wide: (c,) each."""
        return (mean - self.mean) / self.sigma, (var + self.eps).sqrt() / self.sigma

    def limited(self, batch: Moments, cap: Cap | None) -> Moments:
        """A batch as far out as the cap lets it be: what is remembered must bear a broken one.

        One that is too narrow is not, as one sample's values are for good reason.
        """
        if cap is None:
            return batch
        far = cap.mean * self.sigma
        mean = batch.mean.clamp(self.mean - far, self.mean + far)
        widest = (cap.std * self.sigma).square() - self.eps
        return Moments(batch.count, mean, torch.minimum(batch.m2, widest * batch.count))


class AdaptedLayer:
    """A forward pre-hook of one layer, with what it remembers of each stream."""

    def __init__(self, path: str, settings: Settings, current: CurrentStream) -> None:
        self.path = path
        self.streams: dict[str, _State] = {}
        self._settings, self._current = settings, current

    def __call__(
        self, layer: TorchBatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the input moved; None, as they are, where nothing is adapted."""
        x: Any = args[0] if args else kwargs.get("input")
        if trains(layer) or not _is_input(x, layer):  # the layer says why not
            return None
        _check_eager()
        moved = self._moved(layer, x, kwargs.get("mask"))
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "input": moved})

    @property
    def state(self) -> _State | None:
        """What is known of the current stream; None before its first batch."""
        return self.streams.get(self._current.name)

    @state.setter
    def state(self, state: _State | None) -> None:
        self.streams.pop(self._current.name, None)
        if state is not None:
            self.streams[self._current.name] = state

    def drift(self) -> LayerDrift:
        """How far the layer is from its running statistics in the current stream."""
        state = self.state
        if state is None:
            return LayerDrift(self.path, 0, 0.0, 0.0, 1.0, 0.0, 0)
        return LayerDrift(
            self.path,
            int(state.samples),
            float(state.remembered),
            float(state.shift.square().mean().sqrt()),
            float(state.ratio.log().mean().exp()),
            float(state.capped / state.calls.clamp(min=1)),
            int(state.skipped),
        )

    def _moved(
        self,
        layer: TorchBatchNorm,
        x: Float[Tensor, "n c *positions"],
        mask: Bool[Tensor, "n *positions"] | None,
    ) -> Float[Tensor, "n c *positions"]:
        settings, before = self._settings, self._known(x)
        self._check_has_variance(x)
        source = _Source.of(layer, x)
        batch, samples = _moments_of(x, mask), _samples_of(x, mask)
        usable = (batch.mean.isfinite() & batch.m2.isfinite()).all()
        entering = source.limited(batch, settings.cap)
        room = (settings.memory - samples.to(batch.mean.dtype)).clamp(min=0)
        remembered = torch.minimum(before.remembered, room)
        target = _faded(before.target, remembered / before.remembered.clamp(min=1)) + entering
        target = _choose(usable, target, before.target)
        remembered = (remembered + samples).where(usable, before.remembered)
        mean, var = mixed(source.mean, source.var, target, remembered, settings.prior)
        shift, ratio = source.distance(mean, var)
        held = (entering.mean != batch.mean) | (entering.m2 != batch.m2)
        if settings.cap is not None:
            free = ratio  # the mean of limited means needs no other limit
            ratio = ratio.clamp(1 / settings.cap.std, settings.cap.std)
            held = held | (ratio != free)
        self.state = _State(
            target.detach(),
            remembered,
            before.samples + samples.where(usable, 0),
            before.calls + 1,
            before.skipped + ~usable,
            before.capped + held.to(shift.dtype).mean(),
            shift.detach(),
            ratio.detach(),
        )
        if math.isinf(settings.prior):
            return x
        shape, dtype = (-1, *(1,) * (x.ndim - 2)), compute_dtype(x)
        center = (source.mean + shift * source.sigma).to(dtype).view(shape)
        ratio, back = ratio.to(dtype).view(shape), source.mean.to(dtype).view(shape)
        return ((x - center) / ratio + back).to(x.dtype)

    def _known(self, x: Float[Tensor, "n c *positions"]) -> _State:
        """What is known of the current stream, on the device of x."""
        state = self.state
        if state is not None and state.shift.device == x.device:
            return state
        if state is not None:  # the model has been moved
            target = Moments(*(t.to(x.device) for t in vars(state.target).values()))
            return _State(target, *(t.to(x.device) for t in state[1:]))
        none = torch.zeros(x.shape[1], dtype=accumulator(x), device=x.device)
        whole = torch.zeros((), dtype=torch.int64, device=x.device)
        part = none.new_zeros(())
        empty = Moments(torch.zeros_like(none, dtype=torch.int64), none, none)
        return _State(empty, part, whole, whole, whole, part, none, torch.ones_like(none))

    def _check_has_variance(self, x: Float[Tensor, "n c *positions"]) -> None:
        settings = self._settings
        if settings.prior == settings.memory == 0 and x.shape[0] * x.shape[2:].numel() == 1:
            raise ValueError(
                f"{shown(self.path)!r} is given one value per channel, {tuple(x.shape)}, which is "
                "its own mean, so that every output would be β: adapt with a prior or a memory, or "
                "with larger batches"
            )


def trains(layer: TorchBatchNorm) -> bool:
    """Whether a layer is in training mode; `training` of a frozen one of torch.nn's says never."""
    return bool(vars(layer)["training"])


def mixed(
    source_mean: Float[Tensor, " c"],
    source_var: Float[Tensor, " c"],
    target: Moments,
    samples: Float[Tensor, ""],
    prior: float,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """The source's mean and variance, and the target's, by their weights `prior` and `samples`.

    (Schneider et al. 2020, eq. 1.) These are two estimates of one variance, not two sets of data
    to be pooled, whose means' distance would be spread as well.
    """
    share = samples / (prior + samples).clamp(min=torch.finfo(samples.dtype).tiny)
    var = target.m2 / target.count.clamp(min=1)
    return (1 - share) * source_mean + share * target.mean, (1 - share) * source_var + share * var


def _is_input(x: Any, layer: TorchBatchNorm) -> bool:
    """Whether the layer will take it."""
    mean = layer.running_mean
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.ndim >= 2
        and mean is not None
        and layer.running_var is not None
        and x.shape[1] == len(mean)
    )


def _check_eager() -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "adapt remembers what it sees, which torch.compile and the transforms of torch.func "
            "do not run: call the model itself, or remove() the adaptation first"
        )


def _moments_of(x: Tensor, mask: Tensor | None) -> Moments:
    """In wide sums; with a gradient where autograd records."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return moments(x, mask=mask)
    mask = None if mask is None else mask.unsqueeze(1)
    batch = Moments.of(x, (0, *range(2, x.ndim)), mask=mask)
    return Moments(batch.count, batch.mean.to(accumulator(x)), batch.m2.to(accumulator(x)))


def _samples_of(x: Tensor, mask: Tensor | None) -> Int[Tensor, ""]:
    if mask is None:
        return torch.tensor(len(x), device=x.device)
    return mask.flatten(1).any(1).sum()


def _faded(moments: Moments, factor: Float[Tensor, ""]) -> Moments:
    """The same mean and variance, of a part of the count."""
    count = (moments.count * factor).round().to(moments.count.dtype)
    part = count.to(factor.dtype) / moments.count.clamp(min=1)
    return Moments(count, moments.mean, moments.m2 * part)


def _choose(first: Bool[Tensor, ""], one: Moments, other: Moments) -> Moments:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return Moments(*(a.where(first, b) for a, b in pairs))


def is_adapted(model: nn.Module) -> bool:
    """Whether a layer of the model, or the layer itself, is adapted to a stream."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return any(isinstance(hook, AdaptedLayer) for hook in hooks)

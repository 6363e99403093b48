"""Forward passes in which hooks see what enters the batch norm layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from batchnorm.layers import BatchNorm
from batchnorm.models.norms import TorchBatchNorm
from batchnorm.moments import Moments
from batchnorm.repair.table import shown

__all__ = ["Pass", "Run", "bind", "fitting"]

Run: TypeAlias = Callable[[Any], object]
"""Calls the model with a batch."""

# values in a part of a batch, whose float64 copies fit a CPU's cache, or little of other memories
_AT_ONCE = {"cpu": 2**16}
_AT_ONCE_ELSEWHERE = 2**24


class _Reached(Exception):  # noqa: N818 - no error; and of a BaseException hooks are not told
    """The layer in question has seen all of a batch."""


@dataclass
class Pass:
    """One pass over the batches, in which each of `layers` normalizes with the batch at hand.

    The layers are in eval mode, and are given the batch's mean and variance as their running
    ones: no policy, momentum, counter or collective of theirs has a part in it.

    - `layers`: by path.
    - `target`: the layer whose moments are wanted; None: all of them.
    - `calls`: of the target in each batch, after which its forward pass may end; None: unknown.
    - `needs_variance`: whether each batch must have one of its own.
    """

    layers: Mapping[str, TorchBatchNorm]
    target: str | None = None
    calls: Sequence[int] | None = None
    needs_variance: bool = False
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of everything that entered a layer, by its path."""
    paths: list[list[str]] = field(default_factory=list)
    """Of the layers that each batch went through, in order."""
    _reached: bool = False  # by the batch at hand, whatever the model does with the exception

    def over(self, batches: Iterable[Any], run: Run) -> Pass:
        """Run the batches forward; the layers keep the last one's statistics.

        Raises `ValueError` for a layer whose input has no finite statistics, or none at all.
        """
        handles = [
            layer.register_forward_pre_hook(partial(self._sees, path), with_kwargs=True)
            for path, layer in self.layers.items()
        ]
        try:
            for number, batch in enumerate(batches):
                self.paths.append([])
                if self.calls is None or self.calls[number] > 0:
                    self._go(run, batch)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _go(self, run: Run, batch: Any) -> None:
        """A batch through the model, or as far as is wanted."""
        self._reached = False
        try:
            run(batch)
        except Exception:
            if not self._reached:
                raise

    def _sees(
        self, path: str, layer: TorchBatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._reached:  # the model caught it
            raise _Reached
        x = args[0] if args else kwargs.get("input")
        mask = kwargs.get("mask") if isinstance(layer, BatchNorm) else None
        batch = self._checked(path, layer, x, mask)
        self.paths[-1].append(path)
        if self.target is None or self.target == path:
            before = self.moments.get(path)
            self.moments[path] = batch if before is None else before + batch
            if self.calls and self.paths[-1].count(path) == self.calls[len(self.paths) - 1]:
                self._reached = True
                raise _Reached
        bind(layer, *fitting(self._place(path, layer), layer, batch.mean, _biased(batch)))

    def _place(self, path: str, layer: TorchBatchNorm) -> str:
        return f"{type(layer).__name__} {shown(path)!r}, batch {len(self.paths) - 1} (from 0)"

    def _checked(self, path: str, layer: TorchBatchNorm, x: Any, mask: Tensor | None) -> Moments:
        """The moments of a layer's input, if they are as they should be."""
        where = self._place(path, layer)
        channels = 0 if layer.running_mean is None else len(layer.running_mean)
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != channels:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{where}: the input must have the layer's {channels} channels in dimension 1, "
                f"got {got}; a layer that takes them elsewhere cannot be recalibrated: leave it "
                "out with where="
            )
        if self.needs_variance and mask is None and x.numel() == channels:
            raise ValueError(
                f"{where}: one value per channel, input of shape {tuple(x.shape)}, is its own "
                "mean, and every output would be β. Drop the odd last batch "
                "(DataLoader(..., drop_last=True)), use larger batches, or upstream='running', "
                "which normalizes with the running statistics"
            )
        moments = _moments(x, mask)
        if not (moments.mean.isfinite() & moments.m2.isfinite()).all():
            raise ValueError(
                f"{where}: the input's mean and variance must be finite, and are not; it is the "
                "first such layer. Look into that batch's data, and into the weights before the "
                "layer"
            )
        return moments


def bind(layer: TorchBatchNorm, mean: Float[Tensor, " c"], var: Float[Tensor, " c"]) -> None:
    """Give a layer running statistics in tensors of their own; the former ones stay unchanged."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean = mean.to(layer.running_mean)
    layer.running_var = var.to(layer.running_var)


def fitting(
    place: str, layer: TorchBatchNorm, mean: Float[Tensor, " c"], var: Float[Tensor, " c"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """A mean and variance as the layer's buffers will hold them.

    Raises `ValueError` where the buffers' numbers do not reach that far.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    held = mean.to(layer.running_mean), var.to(layer.running_var)
    if not all(t.isfinite().all() for t in held):
        raise ValueError(
            f"{place}: a mean up to {mean.abs().max():.3g} and a variance up to {var.max():.3g} "
            f"exceed what {layer.running_var.dtype} buffers hold; keep them in float32, as this "
            "library's layers do under .half()"
        )
    return held


def _biased(batch: Moments) -> Float[Tensor, " c"]:
    """The variance to normalize with; 0 where nothing was counted."""
    return batch.m2 / batch.count.clamp(min=1)


def _moments(
    x: Float[Tensor, "n c *positions"], mask: Bool[Tensor, "n *positions"] | None
) -> Moments:
    """In float64, some samples at a time."""
    if x.device.type == "mps":
        x = x.cpu()  # which knows no float64
    dims = (0, *range(2, x.ndim))
    values = _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE)
    samples = max(1, values // max(1, math.prod(x.shape[1:])))
    parts = x.split(samples)
    masks = [None] * len(parts) if mask is None else mask.to(x.device).unsqueeze(1).split(samples)
    return Moments.merge(
        Moments.of(part, dims, mask=counted, dtype=torch.float64)
        for part, counted in zip(parts, masks, strict=True)
    )

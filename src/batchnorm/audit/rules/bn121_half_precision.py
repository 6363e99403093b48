"""BN121: running statistics or parameters in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import State

__all__ = ["HalfPrecision"]


class HalfPrecision(Rule):
    """## What it finds

    Running statistics, γ or β in float16 or bfloat16.

    ## Why it hurts

    A running mean moves by a tenth of what is left of the way and less. bfloat16 has 8 bits: near
    1.0 a step below 0.4 % rounds to nothing, and the statistics stop short of the data's.
    float16 overflows at 65,504, which variances of first layers reach, and then inference
    divides by infinity.

    ## Example

        model = model.bfloat16()           # and with it every running mean and variance
        train(model)                       # after 200 steps of data at 1.0078 the mean is 1.0

    ## Fix

    Keep batch norm layers in float32 (`layer.float()`; autocast does). This library's layers
    keep their statistics in float32 under `.half()` and `.bfloat16()`:
    `batchnorm.convert(model, to="batchnorm")`.

    ## When it is fine

    Weights that were trained in float32 and stored in half precision for inference, where no
    value overflowed. γ and β in half precision lose less, and are reported as a fact alone.

    ## Evidence

    NVIDIA/apex#144, pytorch/vision#2599
    """

    code = "BN121"
    name = "statistics in half precision"
    looks_at = "checkpoint, model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for the statistics of all layers, one for parameters alone."""
        statistics = {
            layer.path: dtype
            for layer in state.layers
            if (dtype := _half(layer.running_mean, layer.running_var))
        }
        parameters = {
            layer.path: dtype
            for layer in state.layers
            if layer.path not in statistics and (dtype := _half(layer.weight, layer.bias))
        }
        for what, paths, severity in (
            ("running statistics", statistics, Severity.WARNING),
            ("γ and β", parameters, Severity.INFO),
        ):
            if paths:
                dtypes = " and ".join(
                    sorted({str(d).removeprefix("torch.") for d in paths.values()})
                )
                yield self.found(
                    severity,
                    f"{what} in {dtypes}, {in_layers(paths)}",
                    paths,
                    repair('convert(model, to="batchnorm")', "which keeps them float32"),
                    layers=float(len(paths)),
                )


def _half(*tensors: torch.Tensor | None) -> torch.dtype | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
            return tensor.dtype
    return None

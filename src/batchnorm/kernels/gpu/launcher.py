"""From tensors to a kernel's launch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from batchnorm.kernels.gpu.library import is_interpreted, kernel
from batchnorm.kernels.gpu.plan import Plan
from batchnorm.kernels.layout import layout_of

__all__ = ["launch"]

FRACTIONS = ("eps", "parameter", "share")  # arguments that people may write as ints
LARGEST_UNIT = 8  # values: sixteen bytes in half precision


def launch(
    name: str,
    programs: int,
    device: torch.device,
    plan: Plan | None = None,
    walked: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """Run a kernel in so many programs; `walked` are the tensors that a plan goes over."""
    if plan is not None and walked is not None:
        strides = tuple(None if t is None else t.stride() for t in walked.values())
        arguments |= walked
        arguments |= _steps(plan, tuple(walked), strides)
        tile = plan.tile
        arguments |= {
            "rows": plan.rows, "columns": plan.columns, "blocks": plan.blocks,
            "LANES": tile.lanes, "COLUMNS": tile.columns, "PIECE": tile.piece,
            "LAST": plan.channels_last, "num_warps": tile.warps,
        }  # fmt: skip
    for fraction in FRACTIONS:
        if fraction in arguments:  # Triton takes an int of 1 for a constant, and others for ints
            arguments[fraction] = float(arguments[fraction])
    run = kernel(name)[(programs,)]
    # a product and a sum are contracted where the code says so, and only there: so the same
    # formula has the same bits in every kernel
    arguments["enable_fp_fusion"] = False
    if is_interpreted():
        with np.errstate(all="ignore"):  # NumPy warns of what a GPU computes silently
            run(**arguments)
    elif device.index == torch.cuda.current_device():
        run(**arguments)
    else:
        with torch.cuda.device(device):
            run(**arguments)


@lru_cache(maxsize=4096)
def _steps(
    plan: Plan, names: tuple[str, ...], strides: tuple[tuple[int, ...] | None, ...]
) -> dict[str, int]:
    """The tensors' strides and the plan's width in one unit, and the unit."""
    steps = {"width": plan.width}
    for name, stride in zip(names, strides, strict=True):
        layout = None if stride is None else layout_of(plan.shape, stride)
        outer = inner = 0
        if layout is not None:
            outer = layout.outer * plan.repeat
            inner = 0 if layout.channels_last else layout.inner
        steps |= {f"{name}_outer": outer, f"{name}_inner": inner}
    unit = math.gcd(LARGEST_UNIT, *steps.values())
    return {"UNIT": unit} | {name: step // unit for name, step in steps.items()}

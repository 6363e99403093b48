"""Compiled kernels: each variant compiled once per machine, kept on disk, and found again.

Numba is imported here alone, and only when the first kernel is asked for.
"""

from __future__ import annotations

import hashlib
import types
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.kernels.switch import switched_to

__all__ = [
    "ADDRESSES",
    "COUNTERS",
    "FRACTIONS",
    "PLAN",
    "SETTINGS",
    "STRIDES",
    "Variant",
    "address_of",
    "cache_folder",
    "reason_without",
]

COUNTERS = ("next", "finished")  # first: by which threads share the tasks
PLAN = (  # Plan.numbers
    *("groups", "channels", "samples", "units", "length", "pieces", "piece"),
    *("block", "blocks", "segments", "tasks", "pitch"),
)
STRIDES = (
    *("x_outer", "x_inner", "y_outer", "y_inner", "dy_outer", "dy_inner", "dx_outer", "dx_inner"),
    *("residual_outer", "residual_inner", "g_outer", "g_inner", "repeat"),
)
SETTINGS = ("known",)
FRACTIONS = ("eps", "share", "parameter")
ADDRESSES = (
    *("x", "y", "dy", "dx", "residual", "g"),
    *("counts", "mean", "m2", "weight", "bias", "center", "scale", "shift", "slope", "offset"),
    *("partial_first", "partial_second", "total", "projection", "d_weight", "d_bias"),
    *("running_mean", "running_var", "batches"),
)
FIELDS = (*COUNTERS, *PLAN, *STRIDES, *SETTINGS, *FRACTIONS, *ADDRESSES)
"""What a kernel is given, in this order, eight bytes each."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    kernel: str  # a name in regions.py
    family: str  # rows or columns
    storage: str  # float32, float64, or uint16, which is bfloat16's bits
    act: str
    residual: str  # "none", or the sweep of a backward pass that writes its gradient


@cache
def reason_without() -> str | None:
    """Why there are no compiled kernels here; None where there are."""
    wanted = switched_to()
    if wanted is not None:
        return f"switched off by BATCHNORM_KERNELS={wanted}"
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return "Numba is not installed; pip install 'batchnorm[cpu]'"
        return f"Numba cannot be imported: {error}"
    return None


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: beside the sources, else in the user's cache, else nowhere.

    `NUMBA_CACHE_DIR` names another place.
    """
    from numba.core.caching import CompileResultCacheImpl

    from batchnorm.kernels.cpu.compiled.regions import KERNELS

    try:
        return Path(CompileResultCacheImpl(KERNELS["forward"]).locator.get_cache_path())
    except RuntimeError:
        return None


@cache
def address_of(variant: Variant) -> int:
    """The address of a kernel; loads it from the cache on disk, or compiles it in seconds."""
    import numba
    import numpy as np

    from batchnorm.kernels.cpu.compiled.columns import columns
    from batchnorm.kernels.cpu.compiled.epilogue import epilogue
    from batchnorm.kernels.cpu.compiled.regions import KERNELS
    from batchnorm.kernels.cpu.compiled.rows import rows

    bits = 64 if variant.storage == "float64" else 32
    family = {"rows": rows, "columns": columns}[variant.family]
    blocks = family(epilogue(variant.act, variant.residual, bits))
    function = _specialized(
        KERNELS[variant.kernel],
        f"{'_'.join(map(str, variant))}_{_digest()}",
        STORAGE=getattr(np, variant.storage),
        COMPUTE=getattr(np, f"float{bits}"),
        **{name.upper(): block for name, block in blocks._asdict().items()},
    )
    kinds = [(name, np.float64 if name in FRACTIONS else np.int64) for name in FIELDS]
    signature = numba.void(numba.types.CPointer(numba.from_dtype(np.dtype(kinds))))
    try:
        compiled = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        compiled = numba.cfunc(signature, error_model="numpy")(function)
    _compiled.append(compiled)
    assert compiled.address is not None
    return compiled.address


_compiled: list[Any] = []  # keeps the machine code alive


def _specialized(function: types.FunctionType, name: str, **own: object) -> types.FunctionType:
    """The function with some of its globals its own, under another name."""
    copy = types.FunctionType(function.__code__, {**function.__globals__, **own}, name)
    copy.__qualname__ = name  # by which Numba names its cache's files
    copy.__module__ = function.__module__
    return copy


@cache
def _digest() -> str:
    """Of sources, compiler and processor, for a kernel's name.

    Numba's cache watches one source file, and ours are several. And two processes that write
    entries of one index at the same time may each find the other's code under their own; so
    every variant has a name, and with it an index, to itself.
    """
    import llvmlite.binding as llvm
    import numba

    parts = [numba.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    parts += [file.read_text("utf-8") for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

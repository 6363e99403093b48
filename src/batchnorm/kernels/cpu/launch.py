"""From tensors to a kernel: the record that it is given, and the call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue
from batchnorm.kernels.cpu import pool
from batchnorm.kernels.cpu.library import (
    COUNTERS,
    FIELDS,
    FRACTIONS,
    RECORD,
    Variant,
    address_of,
)
from batchnorm.kernels.cpu.plan import Plan, layout_of

__all__ = ["STORAGE", "launch"]

STORAGE = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"}
"""The dtypes that the kernels know, and what NumPy calls the memory of each."""

WALKED = ("x", "y", "dy", "dx", "residual", "g")  # given with strides
ALONE = 2**15  # values: fewer are done before a second thread has begun

_PLACES = {name: place for place, name in enumerate(FIELDS)}
_ZEROS = [0] * (len(FIELDS) - len(FRACTIONS)) + [0.0] * len(FRACTIONS)


def launch(
    kernel: str,
    plan: Plan,
    dtype: torch.dtype,
    epilogue: Epilogue | None = None,
    **operands: Tensor | int | float | None,
) -> None:
    """Run a kernel over a plan; operands are the record's fields, None for those it has not.

    `epilogue` picks the variant where the kernel depends on one; its residual comes as operand.
    """
    values = _ZEROS.copy()
    first = len(COUNTERS)
    values[first : first + len(plan.numbers)] = plan.numbers
    narrow = plan.channels * plan.length  # of a wide row, if all operands follow without gaps
    repeat = plan.repeat
    for name, operand in operands.items():
        place = _PLACES[name]
        if isinstance(operand, Tensor):
            values[place] = operand.data_ptr()
            if name in WALKED:
                layout = layout_of(tuple(operand.shape), operand.stride())
                assert layout is not None
                values[place + 1], values[place + 2] = layout.outer, layout.inner
                if layout.outer != narrow:
                    repeat = 1
        elif operand is not None:
            values[place] = operand
    values[_PLACES["repeat"]] = repeat
    if epilogue is None:
        act, parameter = "identity", 0.0
    else:
        act, parameter = epilogue.act.name, epilogue.act.parameter
    values[_PLACES["parameter"]] = parameter
    has_residual = operands.get("residual") is not None
    address = address_of(Variant(kernel, plan.family, STORAGE[dtype], act, has_residual))
    size = plan.groups * plan.channels * plan.count
    record = ctypes.create_string_buffer(RECORD.pack(*values))
    pool.run(address, record, 1 if size < ALONE else plan.tasks)

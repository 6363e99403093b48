"""Running statistics, moved in place without waiting for their values."""

from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["track"]


@no_type_check
@triton.jit
def _moved(statistic, new, share):
    """As torch.lerp, which does not leave the ends through rounding."""
    step = new - statistic
    return tl.where(share < 0.5, statistic + share * step, new - step * (1 - share))


@no_type_check
@triton.jit
def _estimates(counts, mean, m2, running_mean, running_var, channel, there):
    """A batch's mean and unbiased variance in the precision that the running ones have."""
    n = tl.load(counts + channel, mask=there, other=2)
    new_mean = tl.load(mean + channel, mask=there, other=0)
    new_var = tl.load(m2 + channel, mask=there, other=0) / tl.maximum(n - 1, 1)
    new_mean = new_mean.to(running_mean.dtype.element_ty).to(tl.float32)
    new_var = new_var.to(running_var.dtype.element_ty).to(tl.float32)
    # no number minus itself is 0 but a finite one; of one value there is no variance
    usable = (new_mean - new_mean == 0) & (new_var - new_var == 0) & (n > 1)
    return new_mean, new_var, usable


@no_type_check
@triton.jit(do_not_specialize=["channels"])
def track(
    running_mean, running_var, batches, counts, mean, m2, share, channels,
    COLUMNS: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """running ← running + share·(batch − running), unless a channel's batch is not finite.

    AVERAGE: each batch's share is one over their number, which `batches` counts.
    """
    useless = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, channels, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        there = channel < channels
        _, _, usable = _estimates(counts, mean, m2, running_mean, running_var, channel, there)
        useless += tl.where(there & (usable == 0), 1, 0)
    useless = tl.sum(useless, 0)
    if batches is not None:
        seen = tl.load(batches).to(tl.int64) + tl.where(useless == 0, 1, 0)
        # every thread has read the counter before one of them writes it
        tl.debug_barrier()
        tl.store(batches, seen)
        if AVERAGE:
            share = 1 / tl.maximum(seen, 1).to(tl.float32)
    for start in range(0, channels, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        there = channel < channels
        new_mean, new_var, _ = _estimates(
            counts, mean, m2, running_mean, running_var, channel, there
        )
        moves = there & (tl.zeros_like(channel) + useless == 0)
        before = tl.load(running_mean + channel, mask=there, other=0).to(tl.float32)
        tl.store(running_mean + channel, _moved(before, new_mean, share), mask=moves)
        before = tl.load(running_var + channel, mask=there, other=0).to(tl.float32)
        tl.store(running_var + channel, _moved(before, new_var, share), mask=moves)

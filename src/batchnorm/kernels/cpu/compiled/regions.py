"""The kernels themselves: what every thread of a team runs, claiming tasks until none is left.

A kernel is a C function of one argument, the address of a record (see library.py). A task is a
block of channels: all of their values in the fused kernels, one segment of one group in the
others. The names in capitals are placeholders; each variant of a kernel has its own.
"""

import inspect
import math
from collections import namedtuple

import numpy as np
from numba import carray

from batchnorm.kernels.cpu.compiled.language import claim, inlined, scratch, span, within
from batchnorm.kernels.cpu.plan import LARGEST_PITCH

__all__ = ["KERNELS"]

STORAGE = np.float32  # of the tensors; uint16 for bfloat16
COMPUTE = np.float32  # of the arithmetic
# the block functions of a family
MOMENTS = APPLY = BACKWARD_REDUCE = BACKWARD_APPLY = BACKWARD_FROZEN = None

NEXT, FINISHED = 0, 1  # the record's counters
NOTHING = -1

Tensors = namedtuple("Tensors", "x y dy dx residual g")
Room = namedtuple(
    "Room",
    "about first second d_weight d_bias column_about column_first column_second "
    "center scale shift slope offset "
    "column_center column_scale column_shift column_slope column_offset",
)
ROOM_SIZE = LARGEST_PITCH * len(Room._fields)


@inlined
def tensors(a, storage):
    """The operands of a record; those that a kernel has not are null and never read."""
    return Tensors(
        span(a.x, storage, "inputs"),
        span(a.y, storage, "output"),
        span(a.dy, storage, "inputs"),
        span(a.dx, storage, "output"),
        span(a.residual, storage, "inputs"),
        span(a.g, storage, "residual gradient"),
    )


@inlined
def rooms(base, pitch, compute):
    """The arrays of `Room` in one stretch of memory, no longer than the plan needs."""
    return Room(
        within(base, 0 * pitch, np.float64, "about"),
        within(base, 1 * pitch, np.float64, "first"),
        within(base, 2 * pitch, np.float64, "second"),
        within(base, 3 * pitch, np.float64, "d_weight"),
        within(base, 4 * pitch, np.float64, "d_bias"),
        within(base, 5 * pitch, np.float64, "column_about"),
        within(base, 6 * pitch, np.float64, "column_first"),
        within(base, 7 * pitch, np.float64, "column_second"),
        within(base, 8 * pitch, compute, "center"),
        within(base, 9 * pitch, compute, "scale"),
        within(base, 10 * pitch, compute, "shift"),
        within(base, 11 * pitch, compute, "slope"),
        within(base, 12 * pitch, compute, "offset"),
        within(base, 13 * pitch, compute, "column_center"),
        within(base, 14 * pitch, compute, "column_scale"),
        within(base, 15 * pitch, compute, "column_shift"),
        within(base, 16 * pitch, compute, "column_slope"),
        within(base, 17 * pitch, compute, "column_offset"),
    )


@inlined
def units_of(a, segment):
    """Where the units of a segment begin and end."""
    return segment * a.units // a.segments, (segment + 1) * a.units // a.segments


@inlined
def task(a, number):
    """Group, channels, units and place among the partial results of a task."""
    segment, block = number % a.segments, number // a.segments
    group, first = block // a.blocks, block % a.blocks * a.block
    unit, stop = units_of(a, segment)
    at = (group * a.segments + segment) * a.channels + first
    return group, first, min(first + a.block, a.channels), unit, stop, at


@inlined
def values_before(a, unit):
    """How many values of a channel lie before a unit of its group."""
    return unit // a.pieces * a.length + unit % a.pieces * a.piece


@inlined
def compute_coefficients(a, room, group, first, last, compute):
    """Center, scale and shift as `Coefficients.of`; 1/σ is left in `room.about`."""
    mean = span(a.mean, np.float64, "per channel")
    m2 = span(a.m2, np.float64, "per channel")
    counts = span(a.counts, np.int64, "per channel")
    weight = span(a.weight, compute, "per channel")
    bias = span(a.bias, compute, "per channel")
    for c in range(first, last):
        at, i = group * a.channels + c, c - first
        n = max(counts[at], 1)
        inverse = 1 / math.sqrt(m2[at] / n + a.eps)
        scale = inverse * np.float64(weight[c]) if a.weight != 0 else inverse
        center = compute(mean[at])
        # what rounding the mean lost comes back through the shift
        shift = (np.float64(center) - mean[at]) * scale
        if a.bias != 0:
            shift += np.float64(bias[c])
        room.about[i] = inverse
        room.center[i] = center
        room.scale[i] = compute(scale)
        room.shift[i] = compute(shift)


@inlined
def compute_slopes(a, room, group, first, last):
    """Slope and offset of dx from the sums in `room`; adds up dγ and dβ."""
    mean = span(a.mean, np.float64, "per channel")
    counts = span(a.counts, np.int64, "per channel")
    for i in range(last - first):
        at = group * a.channels + first + i
        n = max(counts[at], 1)
        inverse, total = room.about[i], room.first[i]
        # the sums are about the rounded center; move them to the mean itself
        rounding = np.float64(room.center[i]) - mean[at]
        projection = room.second[i] + rounding * total
        slope = -inverse * inverse * projection / n
        room.d_weight[i] += projection * inverse
        room.d_bias[i] += total
        room.slope[i] = slope
        room.offset[i] = rounding * slope - total / n


@inlined
def store_parameter_gradients(a, room, first, last, compute):
    """The dγ and dβ that were added up, where they are asked for."""
    d_weight = span(a.d_weight, compute, "per channel")
    d_bias = span(a.d_bias, compute, "per channel")
    for c in range(first, last):
        if a.d_weight != 0:
            d_weight[c] = compute(room.d_weight[c - first])
        if a.d_bias != 0:
            d_bias[c] = compute(room.d_bias[c - first])


@inlined
def copy_in(a, address, values, group, first, last, compute):
    """Numbers of a group's channels [first, last), from an array (groups, channels)."""
    source = span(address, compute, "per channel")
    for c in range(first, last):
        values[c - first] = source[group * a.channels + c]


@inlined
def copy_out(a, values, address, group, first, last, compute):
    """Numbers of a group's channels [first, last), to an array (groups, channels)."""
    target = span(address, compute, "per channel")
    for c in range(first, last):
        target[group * a.channels + c] = values[c - first]


@inlined
def find_coefficients(a, room, group, first, last, compute):
    """Center, scale and shift of a block: those that came, or else those of the moments."""
    if a.center == 0:
        compute_coefficients(a, room, group, first, last, compute)
    else:
        copy_in(a, a.center, room.center, group, first, last, compute)
        copy_in(a, a.scale, room.scale, group, first, last, compute)
        copy_in(a, a.shift, room.shift, group, first, last, compute)


def moments(arguments):
    """Mean and m2 of every channel; the thread that ends last merges the segments."""
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    means = span(a.partial_first, np.float64, "partial")
    m2s = span(a.partial_second, np.float64, "partial")
    mean = span(a.mean, np.float64, "per channel")
    m2 = span(a.m2, np.float64, "per channel")
    while True:
        number = claim(arguments, NEXT)
        if number >= a.tasks:
            return
        group, first, last, unit, stop, at = task(a, number)
        MOMENTS(a, t, room, group, first, last, unit, stop)
        for i in range(last - first):
            means[at + i] = room.first[i]
            m2s[at + i] = room.second[i]
        if claim(arguments, FINISHED) == a.tasks - 1:
            for group in range(a.groups):
                for segment in range(a.segments):
                    unit, stop = units_of(a, segment)
                    seen, all_seen = values_before(a, unit), values_before(a, stop)
                    share = (all_seen - seen) / all_seen
                    at = (group * a.segments + segment) * a.channels
                    to = group * a.channels
                    for c in range(a.channels):
                        old_mean = 0.0 if segment == 0 else mean[to + c]
                        old_m2 = 0.0 if segment == 0 else m2[to + c]
                        difference = means[at + c] - old_mean
                        between = difference * difference * share * seen
                        mean[to + c] = old_mean + difference * share
                        m2[to + c] = old_m2 + m2s[at + c] + between


@inlined
def add_segments(a, partial, total, group):
    """The sums of a group's channels, from those of its segments."""
    to = group * a.channels
    for segment in range(a.segments):
        at = (group * a.segments + segment) * a.channels
        for c in range(a.channels):
            before = 0.0 if segment == 0 else total[to + c]
            total[to + c] = before + partial[at + c]


@inlined
def leave_sums(arguments, a, room, first, last, at):
    """Leave a task's sums for the others; true for the last, which adds the segments of all."""
    totals = span(a.partial_first, np.float64, "partial")
    projections = span(a.partial_second, np.float64, "partial")
    for i in range(last - first):
        totals[at + i] = room.first[i]
        projections[at + i] = room.second[i]
    if claim(arguments, FINISHED) < a.tasks - 1:
        return False
    for group in range(a.groups):
        add_segments(a, totals, span(a.total, np.float64, "per channel"), group)
        add_segments(a, projections, span(a.projection, np.float64, "per channel"), group)
    return True


def forward(arguments):
    """Mean, m2 and y, or y alone where the mean and m2 are known."""
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    ready = NOTHING
    while True:
        number = claim(arguments, NEXT)
        if number >= a.tasks:
            return
        group, first, last, unit, stop, _ = task(a, number)
        if not a.known:
            MOMENTS(a, t, room, group, first, last, unit, stop)
            copy_out(a, room.first, a.mean, group, first, last, np.float64)
            copy_out(a, room.second, a.m2, group, first, last, np.float64)
        if ready != number // a.segments:
            ready = number // a.segments
            find_coefficients(a, room, group, first, last, COMPUTE)
        APPLY(a, t, room, group, first, last, unit, stop)


def backward_reduce(arguments):
    """Σg and Σg·(x − center) of every channel."""
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    ready = NOTHING
    while True:
        number = claim(arguments, NEXT)
        if number >= a.tasks:
            return
        group, first, last, unit, stop, at = task(a, number)
        if ready != number // a.segments:
            ready = number // a.segments
            find_coefficients(a, room, group, first, last, COMPUTE)
        BACKWARD_REDUCE(a, t, room, group, first, last, unit, stop)
        leave_sums(arguments, a, room, first, last, at)


def backward_apply(arguments):
    """dx from coefficients, slope and offset."""
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    while True:
        number = claim(arguments, NEXT)
        if number >= a.tasks:
            return
        group, first, last, unit, stop, _ = task(a, number)
        find_coefficients(a, room, group, first, last, COMPUTE)
        copy_in(a, a.slope, room.slope, group, first, last, COMPUTE)
        copy_in(a, a.offset, room.offset, group, first, last, COMPUTE)
        BACKWARD_APPLY(a, t, room, group, first, last, unit, stop)


def backward(arguments):
    """dx, dγ and dβ, from the sums where they are known.

    A task has its channels in every group, over which dγ and dβ are sums.
    """
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    ready = NOTHING
    while True:
        number = claim(arguments, NEXT)
        if number >= a.blocks * a.segments:
            return
        block, segment = number // a.segments, number % a.segments
        unit, stop = units_of(a, segment)
        first = block * a.block
        last = min(first + a.block, a.channels)
        anew = ready != block or a.groups > 1
        ready = block
        if anew:
            for i in range(last - first):
                room.d_weight[i] = room.d_bias[i] = 0.0
        for group in range(a.groups):
            if anew:
                find_coefficients(a, room, group, first, last, COMPUTE)
                if a.known:
                    copy_in(a, a.total, room.first, group, first, last, np.float64)
                    copy_in(a, a.projection, room.second, group, first, last, np.float64)
                else:
                    BACKWARD_REDUCE(a, t, room, group, first, last, unit, stop)
                compute_slopes(a, room, group, first, last)
            BACKWARD_APPLY(a, t, room, group, first, last, unit, stop)
        if segment == 0:
            store_parameter_gradients(a, room, first, last, COMPUTE)


def backward_frozen(arguments):
    """dx, dγ and dβ in one sweep, where the moments are constants."""
    a = carray(arguments, 1)[0]
    t, room = tensors(a, STORAGE), rooms(scratch(np.float64, ROOM_SIZE), a.pitch, COMPUTE)
    ready = NOTHING
    while True:
        number = claim(arguments, NEXT)
        if number >= a.tasks:
            return
        group, first, last, unit, stop, at = task(a, number)
        if ready != number // a.segments:
            ready = number // a.segments
            find_coefficients(a, room, group, first, last, COMPUTE)
        BACKWARD_FROZEN(a, t, room, group, first, last, unit, stop)
        if leave_sums(arguments, a, room, first, last, at):
            for first in range(0, a.channels, a.block):
                last = min(first + a.block, a.channels)
                for i in range(last - first):
                    room.d_weight[i] = room.d_bias[i] = 0.0
                for group in range(a.groups):
                    find_coefficients(a, room, group, first, last, COMPUTE)
                    copy_in(a, a.total, room.first, group, first, last, np.float64)
                    copy_in(a, a.projection, room.second, group, first, last, np.float64)
                    compute_slopes(a, room, group, first, last)
                store_parameter_gradients(a, room, first, last, COMPUTE)


def track(arguments):
    """Move running statistics towards the batch's, unless one of those is no finite number."""
    a = carray(arguments, 1)[0]
    mean = span(a.mean, np.float64, "per channel")
    m2 = span(a.m2, np.float64, "per channel")
    counts = span(a.counts, np.int64, "per channel")
    running_mean = span(a.running_mean, STORAGE, "output")
    running_var = span(a.running_var, STORAGE, "output")
    batches = span(a.batches, np.int64, "output")
    for c in range(a.channels):
        if counts[c] < 2:  # no variance: 0 / (0 − 1) would be one
            return
        # finite in the buffers' own dtype, which may be narrower than the moments'
        new_mean, new_var = COMPUTE(mean[c]), COMPUTE(m2[c] / (counts[c] - 1))
        if not (math.isfinite(new_mean) and math.isfinite(new_var)):
            return
    if a.batches != 0:
        batches[0] += 1
    share = a.share
    if share < 0:  # the plain average of all batches
        share = 1 / max(batches[0], 1) if a.batches != 0 else 0.0
    for c in range(a.channels):
        new_mean, new_var = COMPUTE(mean[c]), COMPUTE(m2[c] / (counts[c] - 1))
        running_mean[c] += COMPUTE(share) * (new_mean - running_mean[c])
        running_var[c] += COMPUTE(share) * (new_var - running_var[c])


KERNELS = {
    kernel.__name__: inspect.unwrap(kernel)
    for kernel in (
        moments,
        forward,
        backward_reduce,
        backward_apply,
        backward,
        backward_frozen,
        track,
    )
}

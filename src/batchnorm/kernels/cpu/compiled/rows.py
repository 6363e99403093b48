"""Blocks of a tensor whose channels are long rows: (n, c, positions), positions side by side.

A row is cut into pieces; unit u is piece u % pieces of sample u // pieces. Every function here
works on the channels [first, last) of units [unit, stop) of one group, and takes and leaves its
per-channel numbers in `room`, from 0 on.
"""

import numpy as np

from batchnorm.kernels.cpu.compiled.epilogue import Blocks, write, write_nothing
from batchnorm.kernels.cpu.compiled.language import inlined, load, store, summing

__all__ = ["rows"]


@summing
def _sum(x, start, length):
    total = 0.0
    for i in range(start, start + length):
        total += np.float64(load(x, i))
    return total


@summing
def _sums_about(x, start, length, center):
    total = squares = 0.0
    for i in range(start, start + length):
        d = np.float64(load(x, i)) - center
        total += d
        squares += d * d
    return total, squares


@inlined
def _unit(a, group, u):
    """The sample of unit u, where in its rows the unit starts, and its length."""
    start = (u % a.pieces) * a.piece
    return group * a.samples + u // a.pieces, start, min(a.piece, a.length - start)


@inlined
def moments(a, t, room, group, first, last, unit, stop):
    """Mean and m2 of each channel, in one sweep about the mean of the first unit.

    So no more digits cancel than the count of units has; the sums are float64.
    """
    sample, start, length = _unit(a, group, unit)
    base = sample * a.x_outer + start
    for c in range(first, last):
        room.about[c - first] = _sum(t.x, base + c * a.x_inner, length) / length
        room.first[c - first] = 0.0
        room.second[c - first] = 0.0
    count = 0
    for u in range(unit, stop):
        sample, start, length = _unit(a, group, u)
        base = sample * a.x_outer + start
        count += length
        for c in range(first, last):
            about = room.about[c - first]
            total, squares = _sums_about(t.x, base + c * a.x_inner, length, about)
            room.first[c - first] += total
            room.second[c - first] += squares
    for i in range(last - first):
        rest = room.first[i] / count
        room.second[i] = max(room.second[i] - rest * room.first[i], 0.0)
        room.first[i] = room.about[i] + rest


def rows(epilogue):
    """The block functions of this family with this epilogue."""
    value, derivative, add, keep_first, keep_last, reads_kept = epilogue

    @inlined
    def gradient(t, at_dy, at_x, at_residual, center, scale, shift, parameter):
        """What comes through the activation, and x − center."""
        d = load(t.x, at_x) - center
        z = add(d * scale + shift, t.residual, at_residual)
        return derivative(load(t.dy, at_dy), z, parameter), d

    @inlined
    def read_kept(t, at_g, at_x, at_residual, center, scale, shift, parameter):
        return load(t.g, at_g), load(t.x, at_x) - center

    gradient_again = read_kept if reads_kept else gradient

    @inlined
    def apply(a, t, room, group, first, last, unit, stop):
        """y."""
        parameter = a.parameter
        for u in range(unit, stop):
            sample, start, length = _unit(a, group, u)
            for c in range(first, last):
                center, scale = room.center[c - first], room.scale[c - first]
                shift = room.shift[c - first]
                at_x = sample * a.x_outer + c * a.x_inner + start
                at_y = sample * a.y_outer + c * a.y_inner + start
                at_residual = sample * a.residual_outer + c * a.residual_inner + start
                for i in range(length):
                    z = (load(t.x, at_x + i) - center) * scale + shift
                    z = add(z, t.residual, at_residual + i)
                    store(t.y, at_y + i, value(z, parameter))

    @inlined
    def backward_apply(a, t, room, group, first, last, unit, stop):
        """dx; from g where it was kept, or it is kept now."""
        parameter = a.parameter
        for u in range(unit, stop):
            sample, start, length = _unit(a, group, u)
            for c in range(first, last):
                center, scale = room.center[c - first], room.scale[c - first]
                shift = room.shift[c - first]
                slope, offset = room.slope[c - first], room.offset[c - first]
                at_dy = sample * a.dy_outer + c * a.dy_inner + start
                at_x = sample * a.x_outer + c * a.x_inner + start
                at_dx = sample * a.dx_outer + c * a.dx_inner + start
                at_residual = sample * a.residual_outer + c * a.residual_inner + start
                at_g = sample * a.g_outer + c * a.g_inner + start
                at = at_g if reads_kept else at_dy
                for i in range(length):
                    g, d = gradient_again(
                        t, at + i, at_x + i, at_residual + i, center, scale, shift, parameter
                    )
                    store(t.dx, at_dx + i, (g + d * slope + offset) * scale)
                    keep_last(t.g, at_g + i, g)

    def reduction(write_dx):
        """Σg and Σg·(x − center), and on the way g and, from frozen moments, dx."""

        @summing
        def sums(t, at_dy, at_x, at_residual, at_g, at_dx, length, center, scale, shift, parameter):
            total = projection = 0.0
            for i in range(length):
                g, d = gradient(
                    t, at_dy + i, at_x + i, at_residual + i, center, scale, shift, parameter
                )
                total += np.float64(g)
                projection += np.float64(g) * np.float64(d)
                keep_first(t.g, at_g + i, g)
                write_dx(t.dx, at_dx + i, g * scale)
            return total, projection

        @inlined
        def reduce(a, t, room, group, first, last, unit, stop):
            for i in range(last - first):
                room.first[i] = 0.0
                room.second[i] = 0.0
            for u in range(unit, stop):
                sample, start, length = _unit(a, group, u)
                for c in range(first, last):
                    total, projection = sums(
                        t,
                        sample * a.dy_outer + c * a.dy_inner + start,
                        sample * a.x_outer + c * a.x_inner + start,
                        sample * a.residual_outer + c * a.residual_inner + start,
                        sample * a.g_outer + c * a.g_inner + start,
                        sample * a.dx_outer + c * a.dx_inner + start,
                        length,
                        room.center[c - first],
                        room.scale[c - first],
                        room.shift[c - first],
                        a.parameter,
                    )
                    room.first[c - first] += total
                    room.second[c - first] += projection

        return reduce

    return Blocks(moments, apply, reduction(write_nothing), backward_apply, reduction(write))

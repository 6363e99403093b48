"""Blocks of a tensor whose values of one position lie side by side: (rows, columns).

Channels last and (n, c) are such tensors, one column a channel. So is (n, c, positions) with few
positions: one row a sample, `length` columns a channel, which spares it a horizontal sum for each
short row. And `repeat` narrow rows that follow each other are taken as one wide row.

Every function here works on the channels [first, last) of rows [row, stop) of one group, and
takes and leaves its per-channel numbers in `room`, from 0 on.
"""

import numpy as np

from batchnorm.kernels.cpu.compiled.epilogue import Blocks, write, write_nothing
from batchnorm.kernels.cpu.compiled.language import inlined, load, store

__all__ = ["columns"]

CROWDED = 512  # columns


@inlined
def _shape(a, first, last, row, stop):
    """Wide rows of this block, their width in columns, and the columns of a last, shorter one."""
    width = (last - first) * a.length
    rows = stop - row
    return rows // a.repeat, width * a.repeat, width * (rows % a.repeat)


@inlined
def _spread(a, values, columns, channels, width):
    """A number of each channel to every column of it."""
    span = channels * a.length
    for c in range(channels):
        value = values[c]
        for j in range(c * a.length, (c + 1) * a.length):
            columns[j] = value
    for j in range(span, width):
        columns[j] = columns[j - span]


@inlined
def _fold(a, columns, values, channels, width):
    """The sum of all columns of each channel."""
    span = channels * a.length
    for j in range(span, width):
        columns[j % span] += columns[j]
    for c in range(channels):
        total = 0.0
        for j in range(c * a.length, (c + 1) * a.length):
            total += columns[j]
        values[c] = total


@inlined
def _add_about(x, start, stride, rows, width, about, total, squares):
    """Add each column's Σ(x − about) and Σ(x − about)² over rows.

    Four rows at a time spare the sums three trips to the cache. They are a quarter of all apart,
    for a processor fetches ahead where it sees one stream in a page.
    """
    quarter = rows // 4
    for r in range(quarter):
        one = start + r * stride
        two = one + quarter * stride
        three = two + quarter * stride
        four = three + quarter * stride
        for j in range(width):
            center = about[j]
            d1 = np.float64(load(x, one + j)) - center
            d2 = np.float64(load(x, two + j)) - center
            d3 = np.float64(load(x, three + j)) - center
            d4 = np.float64(load(x, four + j)) - center
            total[j] += (d1 + d2) + (d3 + d4)
            squares[j] += (d1 * d1 + d2 * d2) + (d3 * d3 + d4 * d4)
    for r in range(4 * quarter, rows):
        for j in range(width):
            d = np.float64(load(x, start + r * stride + j)) - about[j]
            total[j] += d
            squares[j] += d * d


@inlined
def moments(a, t, room, group, first, last, row, stop):
    """Mean and m2 of each channel, in one sweep about the mean of its first few values.

    So no more digits cancel than the count of values has; the sums are float64.
    """
    rows, width, rest = _shape(a, first, last, row, stop)
    channels = last - first
    start = (group * a.samples + row) * a.x_outer + first * a.length
    stride = a.x_outer * a.repeat
    for j in range(width):
        room.column_about[j] = 0.0
        room.column_first[j] = 0.0
        room.column_second[j] = 0.0
    head = min(rows, 1 + 3 // (a.length * a.repeat))
    if head > 0:
        _add_about(
            t.x, start, stride, head, width, room.column_about, room.column_first,
            room.column_second,
        )  # fmt: skip
        _fold(a, room.column_first, room.about, channels, width)
        for c in range(channels):
            room.about[c] /= head * a.length * a.repeat
    else:
        for c in range(channels):
            room.about[c] = np.float64(load(t.x, start + c * a.length))
    _spread(a, room.about, room.column_about, channels, width)
    for j in range(width):
        room.column_first[j] = 0.0
        room.column_second[j] = 0.0
    _add_about(
        t.x, start, stride, rows, width, room.column_about, room.column_first, room.column_second
    )
    _add_about(
        t.x, start + rows * stride, stride, min(rest, 1), rest, room.column_about,
        room.column_first, room.column_second,
    )  # fmt: skip
    _fold(a, room.column_first, room.first, channels, width)
    _fold(a, room.column_second, room.second, channels, width)
    count = (stop - row) * a.length
    for c in range(channels):
        shift = room.first[c] / count
        room.second[c] = max(room.second[c] - shift * room.first[c], 0.0)
        room.first[c] = room.about[c] + shift


@inlined
def _spread_coefficients(a, room, channels, width):
    _spread(a, room.center, room.column_center, channels, width)
    _spread(a, room.scale, room.column_scale, channels, width)
    _spread(a, room.shift, room.column_shift, channels, width)


def columns(epilogue):
    """The block functions of this family with this epilogue."""
    value, derivative, add, keep_first, keep_last, reads_kept = epilogue

    @inlined
    def gradient(t, room, j, at_dy, at_x, at_residual, parameter):
        """What comes through the activation, and x − center."""
        d = load(t.x, at_x + j) - room.column_center[j]
        z = add(d * room.column_scale[j] + room.column_shift[j], t.residual, at_residual + j)
        return derivative(load(t.dy, at_dy + j), z, parameter), d

    @inlined
    def read_kept(t, room, j, at_g, at_x, at_residual, parameter):
        return load(t.g, at_g + j), load(t.x, at_x + j) - room.column_center[j]

    gradient_again = read_kept if reads_kept else gradient

    @inlined
    def apply(a, t, room, group, first, last, row, stop):
        """y."""
        rows, width, rest = _shape(a, first, last, row, stop)
        _spread_coefficients(a, room, last - first, width)
        sample, column = group * a.samples + row, first * a.length
        parameter = a.parameter
        for r in range(rows + 1):
            this = sample + r * a.repeat
            at_x, at_y = this * a.x_outer + column, this * a.y_outer + column
            at_residual = this * a.residual_outer + column
            for j in range(width if r < rows else rest):
                z = (load(t.x, at_x + j) - room.column_center[j]) * room.column_scale[j]
                z = add(z + room.column_shift[j], t.residual, at_residual + j)
                store(t.y, at_y + j, value(z, parameter))

    @inlined
    def backward_apply(a, t, room, group, first, last, row, stop):
        """dx; from g where it was kept, or it is kept now."""
        rows, width, rest = _shape(a, first, last, row, stop)
        _spread_coefficients(a, room, last - first, width)
        _spread(a, room.slope, room.column_slope, last - first, width)
        _spread(a, room.offset, room.column_offset, last - first, width)
        sample, column = group * a.samples + row, first * a.length
        parameter = a.parameter
        for r in range(rows + 1):
            this = sample + r * a.repeat
            at_dy, at_x = this * a.dy_outer + column, this * a.x_outer + column
            at_residual = this * a.residual_outer + column
            at_dx, at_g = this * a.dx_outer + column, this * a.g_outer + column
            at = at_g if reads_kept else at_dy
            for j in range(width if r < rows else rest):
                g, d = gradient_again(t, room, j, at, at_x, at_residual, parameter)
                dx = g + d * room.column_slope[j] + room.column_offset[j]
                store(t.dx, at_dx + j, dx * room.column_scale[j])
                keep_last(t.g, at_g + j, g)

    def reduction(write_dx):
        """Σg and Σg·(x − center), and on the way g and, from frozen moments, dx."""
        only_sums = not reads_kept and write_dx is write_nothing

        @inlined
        def reduce(a, t, room, group, first, last, row, stop):
            rows, width, rest = _shape(a, first, last, row, stop)
            channels = last - first
            _spread_coefficients(a, room, channels, width)
            for j in range(width):
                room.column_first[j] = 0.0
                room.column_second[j] = 0.0
            sample, column = group * a.samples + row, first * a.length
            parameter = a.parameter
            # two rows at a time, as in the moments, where the columns' numbers crowd the nearest
            # cache; but not where something is stored, which keeps two from being vectorized
            half = rows // 2 if width > CROWDED and only_sums else 0
            down = half * a.repeat
            for r in range(half):
                this = sample + r * a.repeat
                at_dy, at_x = this * a.dy_outer + column, this * a.x_outer + column
                at_residual = this * a.residual_outer + column
                low_dy, low_x = at_dy + down * a.dy_outer, at_x + down * a.x_outer
                low_residual = at_residual + down * a.residual_outer
                for j in range(width):
                    g1, d1 = gradient(t, room, j, at_dy, at_x, at_residual, parameter)
                    g2, d2 = gradient(t, room, j, low_dy, low_x, low_residual, parameter)
                    first1, first2 = np.float64(g1), np.float64(g2)
                    room.column_first[j] += first1 + first2
                    room.column_second[j] += first1 * np.float64(d1) + first2 * np.float64(d2)
            for r in range(2 * half, rows + 1):
                this = sample + r * a.repeat
                at_dy, at_x = this * a.dy_outer + column, this * a.x_outer + column
                at_residual = this * a.residual_outer + column
                at_dx, at_g = this * a.dx_outer + column, this * a.g_outer + column
                for j in range(width if r < rows else rest):
                    g, d = gradient(t, room, j, at_dy, at_x, at_residual, parameter)
                    keep_first(t.g, at_g + j, g)
                    write_dx(t.dx, at_dx + j, g * room.column_scale[j])
                    room.column_first[j] += np.float64(g)
                    room.column_second[j] += np.float64(g) * np.float64(d)
            _fold(a, room.column_first, room.first, channels, width)
            _fold(a, room.column_second, room.second, channels, width)

        return reduce

    return Blocks(moments, apply, reduction(write_nothing), backward_apply, reduction(write))

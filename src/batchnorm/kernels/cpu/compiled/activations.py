"""The activations and their derivatives, one number at a time; LLVM makes vectors of them.

`VALUES[name](z, parameter)` is act(z), `DERIVATIVES[name](dy, z, parameter)` is dy · act'(z).
What needs an exponential runs in float64: its own error is lost when the result is rounded to
float32, and the C library's functions, which are no vector code, are left to float64 input.
"""

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.cpu.compiled.language import inlined, like, power_of_two

__all__ = ["DERIVATIVES", "VALUES"]

LOG2_E = 1 / math.log(2)
LN2_HIGH = 6.93147180369123816490e-01  # its lower bits are 0: k · LN2_HIGH is exact
LN2_LOW = 1.90821492927058770002e-10
ROUNDING = 1.5 * 2**52  # adding it leaves a float64 no bits for a fraction
ROOT_HALF = math.sqrt(1 / 2)
GAUSS = 1 / math.sqrt(2 * math.pi)
ROOT_2_PI = math.sqrt(2 / math.pi)


class Functions(NamedTuple):
    """What the activations are made of, over float64."""

    exp: object
    expm1: object  # of negative numbers
    tanh: object
    erfc: object


@inlined
def _exp(x):
    """To 1e-11: 2^k times a series for what is left of x, which is below ln 2 / 2."""
    x = -708.0 if x < -708.0 else x  # beyond it a float32 is 0 or infinite
    x = 708.0 if x > 708.0 else x
    shifted = x * LOG2_E + ROUNDING
    k = shifted - ROUNDING
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = 1 / 362880
    series = series * r + 1 / 40320
    series = series * r + 1 / 5040
    series = series * r + 1 / 720
    series = series * r + 1 / 120
    series = series * r + 1 / 24
    series = series * r + 1 / 6
    series = series * r + 1 / 2
    return (series * r * r + r + 1.0) * power_of_two(shifted)


@inlined
def _expm1(x):
    small = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24))))
    large = _exp(x) - 1
    return small if abs(x) < 0.01 else large


@inlined
def _tanh(x):
    square = x * x
    small = x * (1 - square * (1 / 3 - square * (2 / 15)))
    e = _exp(-2 * abs(x))
    large = math.copysign((1 - e) / (1 + e), x)
    return small if abs(x) < 0.01 else large


@inlined
def _erfc(x):
    """To 2e-10 of its value: t·exp(−x² + P(2t − 1)), t = 1/(1 + |x|/2).

    The form is Numerical Recipes' (Press et al., section 6.2.2). P interpolates at Chebyshev's
    nodes of |x| ≤ 8.
    """
    positive = abs(x)
    t = 1 / (1 + positive / 2)
    u = 2 * t - 1
    p = 4.600772930463745e-05
    p = p * u - 0.00012713367552406258
    p = p * u - 8.864984436457835e-05
    p = p * u + 0.0006452709421955577
    p = p * u - 0.0001442447485538844
    p = p * u - 0.0023371679813513186
    p = p * u + 0.0017579716739973984
    p = p * u + 0.008823585359548214
    p = p * u - 0.009872565346309073
    p = p * u - 0.04689551405851954
    p = p * u + 0.0473433022564852
    p = p * u + 0.672643221926604
    p = p * u - 0.6717940840388866
    tail = t * _exp(p - positive * positive)
    return 2 - tail if x < 0 else tail


@inlined
def _exp_wide(x):
    return math.exp(x)


@inlined
def _expm1_wide(x):
    return math.expm1(x)


@inlined
def _tanh_wide(x):
    return math.tanh(x)


@inlined
def _erfc_wide(x):
    return math.erfc(x)


def _values(f):
    """act(z) of each name, made of the functions f."""
    exp, expm1, tanh, erfc = f

    @inlined
    def identity(z, parameter):
        return z

    @inlined
    def relu(z, parameter):
        return like(0, z) if z < 0 else z  # a NaN stays one

    @inlined
    def leaky_relu(z, slope):
        scaled = z * like(slope, z)
        return z if z > 0 else scaled

    @inlined
    def elu(z, alpha):
        negative = like(alpha * expm1(np.float64(z)), z)
        return z if z > 0 else negative

    @inlined
    def silu(z, parameter):
        wide = np.float64(z)
        return like(wide / (1 + exp(-wide)), z)

    @inlined
    def gelu(z, parameter):
        wide = np.float64(z)
        return like(wide * 0.5 * erfc(-wide * ROOT_HALF), z)

    @inlined
    def gelu_tanh(z, parameter):
        wide = np.float64(z)
        inner = ROOT_2_PI * (wide + 0.044715 * wide * wide * wide)
        # (1 + tanh u) / 2 without what cancels
        return like(wide / (1 + exp(-2 * inner)), z)

    @inlined
    def hardswish(z, parameter):
        rise = z + like(3, z)
        rise = like(0, z) if rise < 0 else rise
        rise = like(6, z) if rise > 6 else rise
        return z * rise / like(6, z)

    @inlined
    def sigmoid(z, parameter):
        return like(1 / (1 + exp(-np.float64(z))), z)

    @inlined
    def hyperbolic(z, parameter):
        return like(tanh(np.float64(z)), z)

    return {
        "identity": identity,
        "relu": relu,
        "leaky_relu": leaky_relu,
        "elu": elu,
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "hardswish": hardswish,
        "sigmoid": sigmoid,
        "tanh": hyperbolic,
    }


def _derivatives(f):
    """dy · act'(z) of each name, made of the functions f."""
    exp, _, tanh, erfc = f

    @inlined
    def identity(dy, z, parameter):
        return dy

    @inlined
    def relu(dy, z, parameter):
        return like(0, z) if z <= 0 else dy

    @inlined
    def leaky_relu(dy, z, slope):
        scaled = dy * like(slope, z)
        return dy if z > 0 else scaled

    @inlined
    def elu(dy, z, alpha):
        negative = like(np.float64(dy) * alpha * exp(np.float64(z)), z)
        return dy if z > 0 else negative

    @inlined
    def silu(dy, z, parameter):
        wide = np.float64(z)
        s = 1 / (1 + exp(-wide))
        return like(np.float64(dy) * s * (1 + wide * (1 - s)), z)

    @inlined
    def gelu(dy, z, parameter):
        wide = np.float64(z)
        below = 0.5 * erfc(-wide * ROOT_HALF)
        density = GAUSS * exp(-0.5 * wide * wide)
        return like(np.float64(dy) * (below + wide * density), z)

    @inlined
    def gelu_tanh(dy, z, parameter):
        wide = np.float64(z)
        square = wide * wide
        s = 1 / (1 + exp(-2 * ROOT_2_PI * (wide + 0.044715 * square * wide)))
        rise = 2 * ROOT_2_PI * (1 + 3 * 0.044715 * square)
        return like(np.float64(dy) * s * (1 + wide * (1 - s) * rise), z)

    @inlined
    def hardswish(dy, z, parameter):
        between = dy * (z / like(3, z) + like(0.5, z))
        rising = between if z > -3 else like(0, z)
        return dy if z >= 3 else rising

    @inlined
    def sigmoid(dy, z, parameter):
        s = 1 / (1 + exp(-np.float64(z)))
        return like(np.float64(dy) * s * (1 - s), z)

    @inlined
    def hyperbolic(dy, z, parameter):
        t = tanh(np.float64(z))
        return like(np.float64(dy) * (1 - t * t), z)

    return {
        "identity": identity,
        "relu": relu,
        "leaky_relu": leaky_relu,
        "elu": elu,
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "hardswish": hardswish,
        "sigmoid": sigmoid,
        "tanh": hyperbolic,
    }


_NARROW = Functions(_exp, _expm1, _tanh, _erfc)
_WIDE = Functions(_exp_wide, _expm1_wide, _tanh_wide, _erfc_wide)
VALUES = {32: _values(_NARROW), 64: _values(_WIDE)}  # by the bits of the arithmetic
DERIVATIVES = {32: _derivatives(_NARROW), 64: _derivatives(_WIDE)}

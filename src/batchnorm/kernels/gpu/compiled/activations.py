"""The activations and their derivatives, in float32."""

import math
from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["activated", "differentiated"]

ROOT_HALF = tl.constexpr(math.sqrt(1 / 2))
GAUSS = tl.constexpr(1 / math.sqrt(2 * math.pi))
TWICE_ROOT_2_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
CUBIC_RISE = tl.constexpr(3 * 0.044715)


@no_type_check
@triton.jit
def _expm1(x):
    # the terms that are left out are below half a last bit where the series is used
    series = 1 + x * (1 / 6) * (1 + x * (1 / 7))
    series = 1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5) * series))
    series = 1 + x * (1 / 2) * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1)


@no_type_check
@triton.jit
def _tanh(x):
    square = x * x
    series = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -large, large))


@no_type_check
@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@no_type_check
@triton.jit
def _gauss_below(x):
    """The share of a standard normal distribution that lies below x."""
    return 0.5 * (1 + tl.erf(x * ROOT_HALF))


@no_type_check
@triton.jit
def _gate(x):
    """Φ(x) as gelu's tanh form has it: (1 + tanh u) / 2 without what cancels."""
    return _sigmoid((x + x * x * x * CUBIC) * TWICE_ROOT_2_PI)


@no_type_check
@triton.jit
def activated(z, parameter, ACT: tl.constexpr):
    """act(z); a NaN stays one."""
    if ACT == "identity":
        y = z
    elif ACT == "relu":
        y = tl.where(z < 0, 0, z)
    elif ACT == "leaky_relu":
        y = tl.where(z > 0, z, z * parameter)
    elif ACT == "elu":
        y = tl.where(z > 0, z, parameter * _expm1(z))
    elif ACT == "silu":
        y = z * _sigmoid(z)
    elif ACT == "gelu":
        y = z * _gauss_below(z)
    elif ACT == "gelu_tanh":
        y = z * _gate(z)
    elif ACT == "hardswish":
        rise = tl.where(z < -3, 0, z + 3)
        y = z * tl.where(rise > 6, 6, rise) / 6
    elif ACT == "sigmoid":
        y = _sigmoid(z)
    else:
        tl.static_assert(ACT == "tanh")
        y = _tanh(z)
    return y


@no_type_check
@triton.jit
def differentiated(dy, z, parameter, ACT: tl.constexpr):
    """dy · act'(z)."""
    if ACT == "identity":
        g = dy
    elif ACT == "relu":
        g = tl.where(z <= 0, 0, dy)
    elif ACT == "leaky_relu":
        g = tl.where(z > 0, dy, dy * parameter)
    elif ACT == "elu":
        g = tl.where(z > 0, dy, dy * parameter * tl.exp(z))
    elif ACT == "silu":
        s = _sigmoid(z)
        g = dy * s * (1 + z * (1 - s))
    elif ACT == "gelu":
        g = dy * (_gauss_below(z) + z * GAUSS * tl.exp(-0.5 * z * z))
    elif ACT == "gelu_tanh":
        s = _gate(z)
        g = dy * s * (1 + z * (1 - s) * (1 + z * z * CUBIC_RISE) * TWICE_ROOT_2_PI)
    elif ACT == "hardswish":
        rising = tl.where(z > -3, dy * (z / 3 + 0.5), 0)
        g = tl.where(z >= 3, dy, rising)
    elif ACT == "sigmoid":
        s = _sigmoid(z)
        g = dy * s * (1 - s)
    else:
        tl.static_assert(ACT == "tanh")
        t = _tanh(z)
        g = dy * (1 - t * t)
    return g

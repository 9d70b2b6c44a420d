"""Activations in float32: multiplies, adds, divisions and comparisons, each rounded once and none of them fused.

So NumPy and every instruction set agree in every bit. NaN stays NaN. The errors stated are against float64. All
coefficients stand in docs/numerics.md as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxq.numerics.affine import F32


def _polynomial(x: F32, *coefficients: float) -> F32:
    """Horner's scheme, the highest power first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def sigmoid(x: F32) -> F32:
    """1 / (1 + 2**t), t = clip(x, -87, 87) * -log2(e), with 2**t = 2**n * 2**f, n = rne(t), |f| <= 1/2.

    Relative error below 1.6e-7 for x > 0, absolute below 1e-7; relative below 4e-6 down to x = -87, where the rounding
    of t is that of a large number. The polynomial is the best of its degree for the relative error of 2**f.
    """
    t = np.clip(np.asarray(x, np.float32), np.float32(-87), np.float32(87)) * np.float32(-1.44269504088896341)
    magic = np.float32(1.5 * 2**23)  # added to a small float it leaves the nearest integer in the low mantissa bits
    shifted = t + magic
    f = t - (shifted - magic)
    p = _polynomial(
        f,
        1.326472731307149e-3,
        9.671512991189957e-3,
        5.550733581185341e-2,
        0.24022242426872253,
        0.6931470036506653,
        1.0,
    )
    power = ((shifted.view(np.int32) - np.int32(0x4B400000 - 127)) << 23).view(np.float32)
    y: F32 = np.float32(1) / (np.float32(1) + p * power)
    return y


def _gate(x: F32, logit: F32) -> F32:
    """x * sigmoid(logit), with x held at -87 or above: the sigmoid ends at 1.6e-38 instead of 0."""
    return np.maximum(x, np.float32(-87)) * sigmoid(logit)


def silu(x: F32) -> F32:
    """x * sigmoid(x). Absolute error below 1e-7 for x < 0, relative below 2.5e-7 for x > 0."""
    x = np.asarray(x, np.float32)
    return _gate(x, x)


def gelu_tanh(x: F32) -> F32:
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x**3))) / 2 = x * sigmoid(c * (1.5957691 + 0.0713548 c**2)).

    c = clip(x, -87, 87). Absolute error below 2e-7 for x < 0, relative below 4e-7 for x > 0.
    """
    x = np.asarray(x, np.float32)
    c = np.clip(x, np.float32(-87), np.float32(87))
    return _gate(x, c * _polynomial(c * c, 0.07135481627, 1.59576912161))


_GELU = np.array(
    [
        (
            -0.3979057,
            -0.37346542,
            -0.30739462,
            -0.21634752,
            -0.12137586,
            -0.0406195,
            0.015487165,
            0.045270264,
            0.05369695,
            0.04845078,
            0.037237033,
            0.025351914,
            0.015590439,
            0.008755444,
            0.004520987,
            -0.024190523,
        ),
        (
            0.4999751,
            0.49209967,
            0.44118497,
            0.32680815,
            0.16085137,
            -0.020027068,
            -0.17326652,
            -0.2690948,
            -0.300019,
            -0.27736518,
            -0.22398812,
            -0.16163678,
            -0.105618104,
            -0.06301239,
            -0.03451801,
            0.18015599,
        ),
        (
            0.0,
            0.0006366027,
            0.010522881,
            0.046559576,
            0.11918096,
            0.2205661,
            0.32526663,
            0.402381,
            0.43075106,
            0.40629512,
            0.34276304,
            0.26097146,
            0.18058981,
            0.11418601,
            0.06624499,
            -0.33486864,
        ),
    ],
    np.float32,
)
"""a * Phi(-a) for a below 3.875 as parabolas, one for each rne(4 a): coefficients of a**2, of a, and of 1. The first is
0 at 0 and the last is 0 at its end, exactly."""


def gelu(x: F32) -> F32:
    """x * Phi(x), Phi the normal distribution function, as max(x, 0) - d(min(|x|, 3.8749998)), d(a) = a * Phi(-a).

    d is looked up among sixteen parabolas, each the best on its piece; both ends are exact. Absolute error below 7e-5,
    and 2.1e-4 for |x| > 3.6; relative below 1e-3 for x > 0. x is the result of an int8 product and the result becomes
    uint8, whose steps are some hundred times that.
    """
    x = np.asarray(x, np.float32)
    a = np.minimum(np.abs(x), np.float32(3.8749998))
    pieces = (a + np.float32(1.5 * 2**21)).view(np.int32) & 15  # a sum whose last bit counts quarters
    square, slope, offset = _GELU[:, pieces]
    y: F32 = np.where(x < 0, np.float32(0), x) - ((square * a + slope) * a + offset)
    return y


def tanh(x: F32) -> F32:
    """c * (P(c**2) / Q(c**2)), c = clip(x, -7.9053111, 7.9053111). Relative error below 5e-7, |y| <= 1.

    The rational function is the one of Eigen.
    """
    c = np.clip(np.asarray(x, np.float32), np.float32(-7.90531110763549805), np.float32(7.90531110763549805))
    t = c * c
    p = _polynomial(
        t,
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    )
    q = _polynomial(t, 1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
    return c * (p / q)


def hardsigmoid(x: F32) -> F32:
    """clip(x + 3, 0, 6) * f32(1/6): exactly 0 and 1 at the ends, relative error below 1.8e-7 between them for x > 0."""
    y: F32 = np.clip(np.asarray(x, np.float32) + np.float32(3), np.float32(0), np.float32(6)) * np.float32(1 / 6)
    return y


def hardswish(x: F32) -> F32:
    """max(x, -3) * hardsigmoid(x): no product of this order overflows, and -inf gives 0."""
    x = np.asarray(x, np.float32)
    y: F32 = np.maximum(x, np.float32(-3)) * hardsigmoid(x)
    return y


def relu(x: F32) -> F32:
    """0 where x < 0, else x."""
    x = np.asarray(x, np.float32)
    return np.where(x < 0, np.float32(0), x)


ACTIVATIONS: dict[str, Callable[[F32], F32]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
}

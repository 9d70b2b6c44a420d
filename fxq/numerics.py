"""The contract, in NumPy: every kernel, every backend and the golden model return these bits. Imports no torch.

Notation: `q_x` integer, `s_x` scale, `z_x` zero point, `acc` the int32 dot product. `rne` rounds half to even; `f32`
rounds to the nearest float32. Each function's docstring is its equation; docs/numerics.md derives them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fxq.qtypes import ACT_QMAX, ACT_QMIN, INT32_MAX, INT32_MIN, SCALE_FLOOR, WEIGHT_QMAX, QParams

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]


def f32(value: float) -> float:
    """`value` rounded to the nearest float32, as a Python float."""
    return float(np.float32(value))


def activation_qparams(low: float, high: float) -> QParams:
    """Affine uint8 parameters of the range [low, high], widened to hold 0.

    scale = f32((high - low) / 255), at least `SCALE_FLOOR`; zero_point = clamp(rne(-low / scale), 0, 255). An empty
    range (all values 0) gives scale 1, zero point 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return QParams(1.0, 0)
    scale = max(f32(high / (ACT_QMAX - ACT_QMIN) - low / (ACT_QMAX - ACT_QMIN)), SCALE_FLOOR)
    zero_point = int(np.clip(np.rint(-low / scale), ACT_QMIN, ACT_QMAX))
    return QParams(scale, zero_point)


def weight_scales(max_abs: npt.NDArray[np.floating]) -> F32:
    """Symmetric int8 scales: f32(max_abs / 127), at least `SCALE_FLOOR`; 1 where `max_abs` is 0."""
    scales = np.maximum((max_abs.astype(np.float64) / WEIGHT_QMAX).astype(np.float32), np.float32(SCALE_FLOOR))
    return np.where(max_abs == 0, np.float32(1), scales).astype(np.float32)


def quantize(x: F32, scale: float, zero_point: int) -> U8:
    """q = clamp(rne(f32(x * f32(1 / scale))) + zero_point, 0, 255).

    x: float32, any shape. The zero point is added after rounding. The sum is clamped in float, so any finite or
    infinite x is defined; NaN becomes 0.
    """
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore"):
        steps = np.rint(np.asarray(x, np.float32) * inverse)
    steps = np.where(np.isnan(steps), np.float32(ACT_QMIN - zero_point), steps)
    return (np.clip(steps, ACT_QMIN - zero_point, ACT_QMAX - zero_point).astype(np.int32) + zero_point).astype(np.uint8)


def quantize_scaled(x: F32, factor: F32, scale: float, zero_point: int) -> U8:
    """q = quantize(f32(x * factor), scale, zero_point); factor: float32 [K], along the last dimension of x."""
    return quantize(np.asarray(x, np.float32) * factor, scale, zero_point)


def dequantize(q: U8, scale: float, zero_point: int) -> F32:
    """x = f32(f32(scale) * (q - zero_point)); q: uint8, any shape."""
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def quantize_weight(w: F32, scales: F32) -> I8:
    """q = clamp(rne(w / scale), -127, 127), in float64.

    w: float32 [N, ...]; scales: float32 [N] (per channel, axis 0) or [1] (per tensor). Weights are quantized once,
    ahead of time, so this one divides.
    """
    column = scales.reshape(-1, *[1] * (w.ndim - 1)).astype(np.float64)
    return np.clip(np.rint(w.astype(np.float64) / column), -WEIGHT_QMAX, WEIGHT_QMAX).astype(np.int8)


def dequantize_weight(q: I8, scales: F32) -> F32:
    """w = f32(scale * q); q: int8 [N, ...], scales: float32 [N] or [1]."""
    return q.astype(np.float32) * scales.reshape(-1, *[1] * (q.ndim - 1))


def accumulate(q_x: U8, q_w: I8) -> I32:
    """acc[..., n] = sum_k q_x[..., k] * q_w[n, k], exact.

    q_x: uint8 [..., K]; q_w: int8 [N, K]; K <= `MAX_K`. Computed in float64, whose 53 bits hold every partial sum.
    """
    acc: I32 = np.matmul(q_x.astype(np.float64), q_w.T.astype(np.float64)).astype(np.int32)
    return acc


def fold_bias(bias: F32 | None, q_w: I8, s_x: float, z_x: int, s_w: F32) -> npt.NDArray[np.int64]:
    """bias_i32[n] = rne(b[n] / (s_x * s_w[n])) - z_x * sum_k q_w[n, k], in float64 and int64.

    bias: float32 [N] or None for zeros; q_w: int8 [N, K]; s_w: float32 [N]. Returned as int64, because whether it fits
    int32 is the caller's question (`accumulator_bounds`). Source: expand (q_x - z_x) in y = s_x * s_w * sum(...) + b.
    """
    correction: npt.NDArray[np.int64] = -z_x * q_w.astype(np.int64).sum(axis=1)
    if bias is None:
        return correction
    steps = np.rint(bias.astype(np.float64) / (np.float64(s_x) * s_w.astype(np.float64)))
    folded: npt.NDArray[np.int64] = correction + np.clip(steps, -(2.0**62), 2.0**62).astype(np.int64)
    return folded


def accumulator_bounds(bias: npt.NDArray[np.int64], q_w: I8) -> tuple[int, int]:
    """The smallest and largest value that acc + bias, or acc alone, can take over all uint8 inputs."""
    wide = q_w.astype(np.int64)
    low = ACT_QMAX * np.minimum(wide, 0).sum(axis=1)
    high = ACT_QMAX * np.maximum(wide, 0).sum(axis=1)
    return (
        int(np.concatenate([low, low + bias, bias, [0]]).min()),
        int(np.concatenate([high, high + bias, bias, [0]]).max()),
    )


def fits_int32(bounds: tuple[int, int]) -> bool:
    """Whether both bounds lie in int32."""
    return bounds[0] >= INT32_MIN and bounds[1] <= INT32_MAX


def requantize_multiplier(s_x: float, s_w: F32, s_y: float) -> F32:
    """m[n] = f32(s_x * s_w[n] / s_y), the product and quotient in float64."""
    return (np.float64(s_x) * s_w.astype(np.float64) / np.float64(s_y)).astype(np.float32)


def dequantize_multiplier(s_x: float, s_w: F32) -> F32:
    """m[n] = f32(s_x * s_w[n]), the product in float64."""
    return requantize_multiplier(s_x, s_w, 1.0)


def _round_clamp(steps: F32, zero_point: int, low: int, high: int) -> U8:
    """clamp(rne(steps) + zero_point, low, high) as uint8, clamped in float so that no conversion overflows."""
    clamped = np.clip(np.rint(steps), np.float32(low - zero_point), np.float32(high - zero_point))
    return (clamped.astype(np.int32) + zero_point).astype(np.uint8)


def qlinear(q_x: U8, q_w: I8, bias: I32, multiplier: F32, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32(f32(acc + bias) * m)) + z_y, low, high).

    q_x: uint8 [..., K]; q_w: int8 [N, K]; bias: int32 [N] (`fold_bias`); multiplier: float32 [N]. ReLU is low = z_y.
    """
    acc = accumulate(q_x, q_w) + bias
    return _round_clamp(acc.astype(np.float32) * multiplier, zero_point, low, high)


def qlinear_float(q_x: U8, q_w: I8, bias: I32, multiplier: F32, addend: F32 | None = None) -> F32:
    """y = f32(f32(acc + bias) * m), then f32(y + addend) where one is given; shapes as in `qlinear`.

    addend: float32 [N], a bias that does not fit int32; or float32 [..., N], a residual.
    """
    y = (accumulate(q_x, q_w) + bias).astype(np.float32) * multiplier
    return y if addend is None else y + addend


def qadd(q_a: U8, q_b: U8, m_a: float, z_a: int, m_b: float, z_b: int, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32(f32((q_a - z_a) * m_a) + f32((q_b - z_b) * m_b))) + z_y, low, high).

    m_a = f32(s_a / s_y), m_b = f32(s_b / s_y): no fused multiply-add anywhere. q_a and q_b broadcast.
    """
    a = (q_a.astype(np.int32) - z_a).astype(np.float32) * np.float32(m_a)
    b = (q_b.astype(np.int32) - z_b).astype(np.float32) * np.float32(m_b)
    return _round_clamp(a + b, zero_point, low, high)


def requantize(q: U8, z_x: int, multiplier: float, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32((q - z_x) * m)) + z_y, low, high) with m = f32(s_x / s_y)."""
    steps = (q.astype(np.int32) - z_x).astype(np.float32) * np.float32(multiplier)
    return _round_clamp(steps, zero_point, low, high)


PANEL = 64
"""Output channels in a full panel of the packed layout."""


def panel_widths(n: int) -> list[int]:
    """Widths of the panels that hold `n` output channels: 64 each, the last rounded up to a multiple of 16."""
    full, rest = divmod(n, PANEL)
    return [PANEL] * full + ([-(-rest // 16) * 16] if rest else [])


def packed_size(n: int, k: int) -> int:
    """Bytes of an [n, k] weight once packed: both rounded up, n to a multiple of 16 and k of 4."""
    return sum(panel_widths(n)) * (-(-k // 4) * 4)


def pack(q_w: I8) -> I8:
    """The one packed layout, for every instruction set: panels of 64 output channels, [panel][K/4][width][4].

    q_w: int8 [N, K]. Four consecutive k of one channel lie together (what `vpdpbusd` multiplies), then the channels of
    the panel, then k. The last panel is as wide as N needs, in steps of 16; padding is 0. Returns int8 [packed_size].
    """
    n, k = q_w.shape
    k4 = -(-k // 4)
    panels = []
    for i, width in enumerate(panel_widths(n)):
        panel = np.zeros((width, k4 * 4), np.int8)
        rows = q_w[i * PANEL : i * PANEL + width]
        panel[: len(rows), :k] = rows
        panels.append(panel.reshape(width, k4, 4).transpose(1, 0, 2).reshape(-1))
    return np.concatenate(panels) if panels else np.zeros(0, np.int8)


def unpack(packed: I8, n: int, k: int) -> I8:
    """The inverse of `pack`: int8 [n, k]."""
    assert packed.shape == (packed_size(n, k),), (packed.shape, n, k)
    k4 = -(-k // 4)
    rows, start = [], 0
    for width in panel_widths(n):
        panel = packed[start : start + width * k4 * 4].reshape(k4, width, 4)
        rows.append(panel.transpose(1, 0, 2).reshape(width, k4 * 4))
        start += width * k4 * 4
    return np.ascontiguousarray(np.concatenate(rows)[:n, :k]) if rows else np.zeros((n, k), np.int8)


# Activations in float32: multiplies, adds, divisions and comparisons, each rounded once and none of them fused, so that
# NumPy and every instruction set agree in every bit. NaN stays NaN. The errors stated are against float64.


def _polynomial(x: F32, *coefficients: float) -> F32:
    """Horner's scheme, the highest power first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def sigmoid(x: F32) -> F32:
    """1 / (1 + exp(-c)), c = clip(x, -87, 87), with exp(v) = 2**n * exp(r), n = rne(v / ln 2), |r| <= ln 2 / 2.

    Relative error below 1.6e-7 for |x| <= 87, absolute below 1e-7. ln 2 is split in two, so that n * 0.693359375 is
    exact; the polynomial is that of Cephes' expf.
    """
    v = -np.clip(np.asarray(x, np.float32), np.float32(-87), np.float32(87))
    magic = np.float32(1.5 * 2**23)  # added to a small float it leaves the nearest integer in the low mantissa bits
    shifted = v * np.float32(1.44269504088896341) + magic
    n = shifted - magic
    r = v - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = _polynomial(
        r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
    )
    power = ((shifted.view(np.int32) - np.int32(0x4B400000 - 127)) << 23).view(np.float32)
    y: F32 = np.float32(1) / (np.float32(1) + ((p * (r * r) + r) + np.float32(1)) * power)
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


def gelu(x: F32) -> F32:
    """x * Phi(x), Phi the normal distribution function, as x * sigmoid(c * p(min(c**2, 30))), c = clip(x, -87, 87).

    p(x**2) = logit(Phi(x)) / x, an even function, fitted on |x| < 5.5 so that the error of x * Phi(x) is even. Absolute
    error below 2e-7 for x < 0, relative below 4e-7 for x > 0.
    """
    x = np.asarray(x, np.float32)
    c = np.clip(x, np.float32(-87), np.float32(87))
    p = _polynomial(
        np.minimum(c * c, np.float32(30)),
        3.611615229104359e-09,
        -2.669106606845162e-07,
        7.938518137962092e-06,
        -0.00011048255692003295,
        -6.625254172831774e-05,
        0.07266855984926224,
        1.5957684516906738,
    )
    return _gate(x, c * p)


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
}


def qlinear_act(q_x: U8, q_w: I8, bias: I32, multiplier: F32, activation: str, addend: F32 | None = None) -> F32:
    """y = act(qlinear_float(...)); activation: a key of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](qlinear_float(q_x, q_w, bias, multiplier, addend))


def qlinear_act_quantize(
    q_x: U8, q_w: I8, bias: I32, multiplier: F32, activation: str, scale: float, zero_point: int
) -> U8:
    """q_y = quantize(act(qlinear_float(...)), scale, zero_point)."""
    return quantize(qlinear_act(q_x, q_w, bias, multiplier, activation), scale, zero_point)

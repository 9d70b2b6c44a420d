"""Real numbers as integers and back: q = clamp(rne(x / s) + z), x = s * (q - z), and sums of such values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxq.qtypes import ACT_QMAX, ACT_QMIN, SCALE_FLOOR, WEIGHT_QMAX, QParams

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
    return QParams(scale, min(max(round(-low / scale), ACT_QMIN), ACT_QMAX))


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
        steps = np.asarray(x, np.float32) * inverse
    return round_clamp(steps, zero_point, ACT_QMIN, ACT_QMAX)


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


def fused_multiply_add(a: F32, b: F32 | np.float32, c: F32 | np.float32) -> F32:
    """f32(a * b + c), rounded once.

    The product is exact in float64. A second rounding of the sum goes astray only where the first has ended half way
    between two float32; there it is rounded to odd instead, which is never half way.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = a.astype(np.float64) * b
        total = product + c
        half = ((total.view(np.int64) & (2**29 - 1)) == 2**28) | (np.abs(total) < 2.0**-125)
        if half.any():
            total[half] = _add_to_odd(product[half], np.broadcast_to(c, total.shape)[half])
        return total.astype(np.float32)


def _add_to_odd(a: npt.NDArray[np.float64], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """a + b, where it is not exact the one of its two neighbours whose last bit is set."""
    total = a + b
    back = total - a
    lost = (a - (total - back)) + (b - back)
    bits = total.view(np.int64)
    inexact = (lost != 0) & (bits & 1 == 0)
    bits += np.where((lost > 0) == (total > 0), inexact, -1 * inexact)
    return total


def round_clamp(steps: F32, zero_point: int, low: int, high: int) -> U8:
    """clamp(rne(steps) + zero_point, low, high) as uint8, clamped in float so that none overflows; NaN: low."""
    raised = np.fmax(np.rint(steps), np.float32(low - zero_point))
    return (np.minimum(raised, np.float32(high - zero_point)).astype(np.int32) + zero_point).astype(np.uint8)


def qadd(q_a: U8, q_b: U8, m_a: float, z_a: int, m_b: float, z_b: int, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32(f32((q_a - z_a) * m_a) + f32((q_b - z_b) * m_b))) + z_y, low, high).

    m_a = f32(s_a / s_y), m_b = f32(s_b / s_y): no fused multiply-add anywhere. q_a and q_b broadcast.
    """
    a = (q_a.astype(np.int32) - z_a).astype(np.float32) * np.float32(m_a)
    b = (q_b.astype(np.int32) - z_b).astype(np.float32) * np.float32(m_b)
    return round_clamp(a + b, zero_point, low, high)


def qmul(q_a: U8, q_b: U8, m: float, z_a: int, z_b: int, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32((q_a - z_a) * (q_b - z_b) * m)) + z_y, low, high), m = f32(s_a * s_b / s_y).

    The product of the integers is exact in float32. q_a and q_b broadcast.
    """
    product = (q_a.astype(np.int32) - z_a) * (q_b.astype(np.int32) - z_b)
    return round_clamp(product.astype(np.float32) * np.float32(m), zero_point, low, high)


def requantize(q: U8, z_x: int, multiplier: float, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32((q - z_x) * m)) + z_y, low, high) with m = f32(s_x / s_y)."""
    steps = (q.astype(np.int32) - z_x).astype(np.float32) * np.float32(multiplier)
    return round_clamp(steps, zero_point, low, high)


def qcat(tensors: Sequence[U8]) -> U8:
    """The integers of uint8 [B, C_i, ...] of one scale and zero point, one behind the other: [B, sum of C_i, ...]."""
    return np.concatenate(tensors, 1)

"""Requantization without a float multiply: a real factor becomes an integer multiplier and a right shift.

    factor = multiplier * 2**-shift,  multiplier in [2**30, 2**31),  shift in 0..62                               (F1)

`multiplier` is the factor's mantissa as a Q31 fraction, and `shift` counts from the 64-bit product; TFLite writes the
same numbers as a multiplier and an exponent 31 - shift. What scales an accumulator is then one 32 x 32 -> 64 bit
product and a rounding shift, in one of two ways (`ROUNDINGS`):

    "single"   floor((v * multiplier + 2**(shift - 1)) / 2**shift)                 one rounding, ties go up       (F2)
    "tflite"   RoundingDivideByPOT(SaturatingRoundingDoublingHighMul(v << left, multiplier), right)               (F3)

(F2) is TFLite's TFLITE_SINGLE_ROUNDING, ruy's and XNNPACK's rule; (F3) is gemmlowp's and TFLite's default. It rounds
twice, so it is a unit off for some values whose fraction is close to one half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import I8, I32, U8
from fxq.numerics.linear import accumulate
from fxq.qtypes import INT32_MAX, INT32_MIN

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Rounding = Literal["single", "tflite"]

MAX_SHIFT = 62
"""The largest shift: 2**-32 times any int32 rounds to 0, whatever the mantissa."""


def fixed_multiplier(factor: F64 | np.float64) -> tuple[I32, I32]:
    """Multiplier and shift of each factor (F1), the mantissa rounded to nearest, ties away from zero.

    factor: float64, any shape, >= 0 and finite. A factor below 2**-32 becomes multiplier 0, one of 2**31 or more the
    largest there is; both give what the exact factor would, after the clamp to uint8. Source: TFLite's
    QuantizeMultiplier.
    """
    factor = np.asarray(factor, np.float64)
    mantissa, exponent = np.frexp(factor)
    multiplier = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    carried = multiplier == 2**31  # 0.99999... rounded up to 1
    multiplier = np.where(carried, 2**30, multiplier)
    shift = 31 - (exponent.astype(np.int64) + carried)
    too_large, too_small = shift < 0, shift > MAX_SHIFT
    multiplier = np.where(too_large, INT32_MAX, np.where(too_small, 0, multiplier))
    return multiplier.astype(np.int32), np.clip(shift, 0, MAX_SHIFT).astype(np.int32)


def fixed_multipliers(factors: F64) -> tuple[I32, int]:
    """Multipliers of several factors under one shift, so that their products can be added: the largest sets it.

    factors: float64 [T], each >= 0 and finite. The largest multiplier lies in [2**30, 2**31).
    """
    _, shift = fixed_multiplier(np.max(factors))
    multipliers = np.floor(np.ldexp(factors, int(shift)) + 0.5)
    return np.minimum(multipliers, INT32_MAX).astype(np.int32), int(shift)


def mean_multiplier(multiplier: int, shift: int, count: I64) -> tuple[I32, I32]:
    """Multiplier and shift of factor / count, in integers alone; factor as in (F1), count: int64 in 1..2**23.

    m' = floor((multiplier * 2**e + floor(count / 2)) / count), shift' = shift + e, with the e that brings m' back to
    2**30..2**31 - 1. Where shift' would exceed 62, the mean of uint8 rounds to 0, and so does m'.
    """
    count = np.asarray(count, np.int64)
    extra = np.frexp(count - 1)[1].astype(np.int64)  # 2**extra is the first power of two that is not below count

    def divided(extra: I64) -> I64:
        quotient: I64 = ((np.int64(multiplier) << extra) + count // 2) // count
        return quotient

    extra = extra - (divided(extra) > INT32_MAX)
    too_small = shift + extra > MAX_SHIFT
    mantissa = np.where(too_small, 0, divided(extra)).astype(np.int32)
    return mantissa, np.minimum(shift + extra, MAX_SHIFT).astype(np.int32)


def scale_single(v: I64, multiplier: I32, shift: I32) -> I64:
    """floor((v * multiplier + 2**(shift - 1)) / 2**shift); v in int32, in int64. Ties go towards plus infinity."""
    v, m, s = (np.asarray(operand, np.int64) for operand in (v, multiplier, shift))
    scaled: I64 = (v * m + (np.int64(1) << s >> 1)) >> s
    return scaled


def scale_tflite(v: I64, multiplier: I32, shift: I32) -> I64:
    """TFLite's MultiplyByQuantizedMultiplier, both of its roundings; v in int32, in int64.

    left = max(31 - shift, 0), right = max(shift - 31, 0)
    high = floor((saturate(v * 2**left) * multiplier + 2**30) / 2**31)       SaturatingRoundingDoublingHighMul
    y    = high / 2**right to nearest, ties away from zero                   RoundingDivideByPOT

    saturate holds the shifted value in int32, as gemmlowp's SaturatingRoundingMultiplyByPOT does.
    """
    v, m, s = (np.asarray(operand, np.int64) for operand in (v, multiplier, shift))
    left, right = np.maximum(31 - s, 0), np.maximum(s - 31, 0)
    shifted = np.clip(v << left, INT32_MIN, INT32_MAX)
    high = (shifted * m + (1 << 30)) >> 31
    half = np.int64(1) << right >> 1
    scaled: I64 = (high + half - ((high < 0) & (right > 0))) >> right
    return scaled


ROUNDINGS: dict[str, Callable[[I64, I32, I32], I64]] = {"single": scale_single, "tflite": scale_tflite}


def clamp_integers(steps: I64, zero_point: int, low: int, high: int) -> U8:
    """clamp(steps + zero_point, low, high) as uint8."""
    return np.clip(steps + zero_point, low, high).astype(np.uint8)


def qlinear_fixed(
    q_x: U8,
    q_w: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
    zero_w: I32 | None = None,
) -> U8:
    """q_y = clamp(scale(acc + bias - z_w * sum_k q_x[k], multiplier, shift) + z_y, low, high), scale (F2) or (F3).

    q_x: uint8 [..., K]; q_w: int8 [N, K]; bias, multiplier, shift: int32 [N]; zero_w: int32 [N], the zero points of
    affine weights, whose constant part K * z_x * z_w is in the bias. What is scaled must fit int32.
    """
    v: I64 = accumulate(q_x, q_w).astype(np.int64) + bias
    if zero_w is not None:
        v = v - zero_w.astype(np.int64) * q_x.sum(-1, dtype=np.int64, keepdims=True)
    return clamp_integers(ROUNDINGS[rounding](v, multiplier, shift), zero_point, low, high)


def requantize_fixed(
    q: U8, z_x: int, multiplier: int, shift: int, zero_point: int, low: int, high: int, rounding: str = "single"
) -> U8:
    """q_y = clamp(scale(q - z_x, multiplier, shift) + z_y, low, high)."""
    steps = ROUNDINGS[rounding](q.astype(np.int64) - z_x, np.array(multiplier, np.int32), np.array(shift, np.int32))
    return clamp_integers(steps, zero_point, low, high)


def qadd_fixed(
    q_a: U8, q_b: U8, m_a: int, z_a: int, m_b: int, z_b: int, shift: int, zero_point: int, low: int, high: int
) -> U8:
    """q_y = clamp(floor(((q_a - z_a) * m_a + (q_b - z_b) * m_b + 2**(shift - 1)) / 2**shift) + z_y, low, high).

    m_a * 2**-shift = s_a / s_y, likewise b (`fixed_multipliers`): both operands under one shift, so that the exact sum
    is rounded once. q_a and q_b broadcast.
    """
    v: I64 = (q_a.astype(np.int64) - z_a) * m_a + (q_b.astype(np.int64) - z_b) * m_b
    return clamp_integers((v + (1 << shift >> 1)) >> shift, zero_point, low, high)


def qmul_fixed(
    q_a: U8,
    q_b: U8,
    z_a: int,
    z_b: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """q_y = clamp(scale((q_a - z_a) * (q_b - z_b), multiplier, shift) + z_y, low, high); q_a and q_b broadcast.

    multiplier * 2**-shift = s_a * s_b / s_y.
    """
    v = (q_a.astype(np.int64) - z_a) * (q_b.astype(np.int64) - z_b)
    steps = ROUNDINGS[rounding](v, np.array(multiplier, np.int32), np.array(shift, np.int32))
    return clamp_integers(steps, zero_point, low, high)

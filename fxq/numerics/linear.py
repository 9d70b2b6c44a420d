"""The product: exact int32 sums, the bias that folds the zero points, and the two epilogues."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxq.numerics.activations import ACTIVATIONS
from fxq.numerics.affine import F32, I8, I32, U8, quantize, round_clamp
from fxq.qtypes import ACT_QMAX, INT32_MAX, INT32_MIN


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


def real_multiplier(s_x: float, s_w: F32, s_y: float) -> npt.NDArray[np.float64]:
    """s_x * s_w[n] / s_y in float64."""
    factor: npt.NDArray[np.float64] = np.float64(s_x) * s_w.astype(np.float64) / np.float64(s_y)
    return factor


def requantize_multiplier(s_x: float, s_w: F32, s_y: float) -> F32:
    """m[n] = f32(s_x * s_w[n] / s_y), the product and quotient in float64."""
    return real_multiplier(s_x, s_w, s_y).astype(np.float32)


def dequantize_multiplier(s_x: float, s_w: F32) -> F32:
    """m[n] = f32(s_x * s_w[n]), the product in float64."""
    return requantize_multiplier(s_x, s_w, 1.0)


def qlinear(q_x: U8, q_w: I8, bias: I32, multiplier: F32, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32(f32(acc + bias) * m)) + z_y, low, high).

    q_x: uint8 [..., K]; q_w: int8 [N, K]; bias: int32 [N] (`fold_bias`); multiplier: float32 [N]. ReLU is low = z_y.
    """
    acc = accumulate(q_x, q_w) + bias
    return round_clamp(acc.astype(np.float32) * multiplier, zero_point, low, high)


def qlinear_float(q_x: U8, q_w: I8, bias: I32, multiplier: F32, addend: F32 | None = None) -> F32:
    """y = f32(f32(acc + bias) * m), then f32(y + addend) where one is given; shapes as in `qlinear`.

    addend: float32, a bias [N] that does not fit int32 or a residual [..., N]; it broadcasts, but never over N.
    """
    y = (accumulate(q_x, q_w) + bias).astype(np.float32) * multiplier
    return y if addend is None else y + addend


def qlinear_act(q_x: U8, q_w: I8, bias: I32, multiplier: F32, activation: str, addend: F32 | None = None) -> F32:
    """y = act(qlinear_float(...)); activation: a key of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](qlinear_float(q_x, q_w, bias, multiplier, addend))


def qlinear_act_quantize(
    q_x: U8,
    q_w: I8,
    bias: I32,
    multiplier: F32,
    activation: str,
    scale: float,
    zero_point: int,
    factor: F32 | None = None,
) -> U8:
    """q_y = quantize(act(qlinear_float(...)) [* factor], scale, zero_point); factor: float32 [N]."""
    y = qlinear_act(q_x, q_w, bias, multiplier, activation)
    return quantize(y if factor is None else y * factor, scale, zero_point)

"""What torch's quantized engines compute, so that their integers can be reproduced: constants and roundings.

Every engine forms the same exact sums, here with the zero points taken out: acc = sum_k (q_x - z_x) * (q_w - z_w).

    fbgemm    q_y = clamp(rne(f32(f32(f32(acc) + b / a) * f32(a / s_y))) + z_y, low, 255),  a = f32(s_x * s_w[n])
    onednn    v   = f32(f32(f32(f32(acc) * r(s_x)) * r(s_w[n])) + b), r(s) = f32(1 / f32(1 / s));  a relu: max(v, 0)
              q_y = clamp(rne(f32(f32(v * f32(1 / r(s_y))) + z_y)), 0, 255)
    qnnpack   q_y = clamp(rne(f32(f32(acc + rne(f32(b * f32(1 / a)))) * f32(a * f32(1 / s_y)))) + z_y, low, 255)
    tensors   q_x = clamp(rne(fma(x, f32(1 / s_x), z_x)), 0, 255), a fused multiply-add: one rounding

Found with torch 2.13.0 on a processor with VNNI, and held to it by the tests. Without VNNI, torch's sums may saturate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, U8
from fxq.qtypes import ACT_QMAX, ACT_QMIN

ENGINES = ("fbgemm", "onednn", "qnnpack")


def fbgemm_constants(bias: F32 | None, s_x: float, s_w: F32, s_y: float) -> tuple[F32, F32]:
    """(b / a, a / s_y), float32 [N]: what is added to the sums, and what they are multiplied by then."""
    step = np.float32(s_x) * s_w
    return (np.zeros_like(step) if bias is None else bias / step), step / np.float32(s_y)


def onednn_scales(scales: float | npt.NDArray[np.float64]) -> F32:
    """r(s) = f32(1 / f32(1 / s)): scales on their way through a reciprocal, taken in float64, and back."""
    return np.float32(1) / np.asarray(1 / np.float64(scales)).astype(np.float32)


def qnnpack_constants(bias: F32 | None, s_x: float, s_w: F32, s_y: float) -> tuple[F32, F32]:
    """(rne(b * (1 / a)), a * (1 / s_y)), float32 [N]: whole steps that are added to the sums, and their multiplier."""
    step = np.float32(s_x) * s_w
    added = np.zeros_like(step) if bias is None else np.rint(bias * (np.float32(1) / step))
    return added, step * (np.float32(1) / np.float32(s_y))


def quantize_fused(x: F32, scale: float, zero_point: int) -> U8:
    """q = clamp(rne(fma(x, f32(1 / scale), zero_point)), 0, 255); NaN becomes 0.

    The fused sum in float64, rounded to odd, so that the rounding to float32 that follows is the only one.
    """
    product = np.asarray(x, np.float32).astype(np.float64) * np.float64(np.float32(1) / np.float32(scale))  # exact
    total = product + zero_point
    with np.errstate(over="ignore", invalid="ignore"):
        back = total - product
        lost = (product - (total - back)) + (zero_point - back)
        inexact = np.isfinite(total) & (lost != 0) & (total.view(np.int64) & 1 == 0)
        odd = np.where(inexact, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
        return _clamp(odd.astype(np.float32))


def quantize_onednn(x: F32, factor: F32, bias: F32, relu: bool, scale: float, zero_point: int) -> U8:
    """q = clamp(rne(f32(f32(v * f32(1 / scale)) + zero_point)), 0, 255), v = f32(f32(x * factor) + bias) or max(v, 0).

    x: float32 [..., N]; factor, bias: float32 [N].
    """
    v = x * factor + bias
    v = np.maximum(v, np.float32(0)) if relu else v
    return _clamp(v * (np.float32(1) / np.float32(scale)) + np.float32(zero_point))


def _clamp(steps: F32) -> U8:
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    return np.clip(np.rint(steps), ACT_QMIN, ACT_QMAX).astype(np.uint8)

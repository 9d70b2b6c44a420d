"""The product whose rows find their own scale and zero point at run time: float32 in, float32 out."""

from __future__ import annotations

import numpy as np

from fxq.numerics.activations import ACTIVATIONS
from fxq.numerics.affine import F32, I8, I32, U8
from fxq.numerics.linear import accumulate
from fxq.qtypes import ACT_QMAX, SCALE_FLOOR


def row_qparams(x: F32) -> tuple[F32, I32]:
    """Each row's scale s = f32(f32(high / 255) - f32(low / 255)) and zero point z = clamp(rne(f32(-low * i)), 0, 255).

    x: float32 [..., K]; low and high: the least and the greatest value of a row and 0; s is at least `SCALE_FLOOR`, and
    i = f32(1 / s). Both results have the shape [..., 1]. A row that holds NaN or infinity has scale NaN, zero point 0.
    """
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(-1, keepdims=True)
    known = np.where(finite, x, np.float32(0))
    steps = np.float32(ACT_QMAX)
    low, high = (bound(known, axis=-1, keepdims=True, initial=np.float32(0)) for bound in (np.min, np.max))
    scale = np.maximum(high / steps - low / steps, np.float32(SCALE_FLOOR))
    zero_point = np.clip(np.rint(-low * (np.float32(1) / scale)), np.float32(0), steps).astype(np.int32)
    return np.where(finite, scale, np.float32(np.nan)).astype(np.float32), zero_point


def quantize_rows(x: F32) -> tuple[U8, F32, I32]:
    """q = clamp(rne(f32(x * f32(1 / s))) + z, 0, 255) with s and z of `row_qparams`; 0 in a row that is not finite.

    Returns q [..., K], s [..., 1] and z [..., 1].
    """
    x = np.asarray(x, np.float32)
    scale, zero_point = row_qparams(x)
    with np.errstate(invalid="ignore"):
        steps = np.rint(x * (np.float32(1) / scale))
    steps = np.where(np.isnan(scale), np.float32(0), steps)
    q = np.clip(steps, -zero_point.astype(np.float32), (ACT_QMAX - zero_point).astype(np.float32)).astype(np.int32)
    return (q + zero_point).astype(np.uint8), scale, zero_point


def fake_quantize_rows(x: F32) -> F32:
    """f32(s * (q - z)): what is left of x [..., K] after `quantize_rows`."""
    q, scale, zero_point = quantize_rows(x)
    return (q.astype(np.int32) - zero_point).astype(np.float32) * scale


def qlinear_dynamic(
    x: F32,
    q_w: I8,
    s_w: F32,
    bias: F32 | None = None,
    addend: F32 | None = None,
    activation: str = "",
    low: float | None = None,
    high: float | None = None,
) -> F32:
    """y = f32(f32(acc - z[m] * sum_k q_w[n, k]) * f32(s[m] * s_w[n])), acc = sum_k q[m, k] * q_w[n, k], exact in int32.

    x: float32 [..., K], quantized by `quantize_rows`; q_w: int8 [N, K]; s_w: float32 [N]. Then, each rounded once and
    where given: + bias [N], + addend ([N] or [..., N]), clamp to [low, high], the activation (of `ACTIVATIONS`). A row
    that holds NaN or infinity becomes NaN, and no row depends on another.
    """
    q, scale, zero_point = quantize_rows(x)
    exact = accumulate(q, q_w) - zero_point * q_w.astype(np.int32).sum(axis=1, dtype=np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        y: F32 = exact.astype(np.float32) * (scale * s_w)
        for term in (bias, addend):
            y = y if term is None else y + term
    y = y if low is None else np.where(y < np.float32(low), np.float32(low), y)
    y = y if high is None else np.where(y > np.float32(high), np.float32(high), y)
    return ACTIVATIONS[activation](y) if activation else y

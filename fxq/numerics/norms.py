"""Normalisation of rows in float32, in a fixed order: NumPy and every instruction set agree in every bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxq.numerics.affine import F32, U8, quantize

LANES = 64
"""Partial sums of a row: value k goes to sum k % 64, in order; then each half is added to the other, down to one."""


def row_sum(x: F32) -> F32:
    """The sum of each row of x, float32 [..., K] -> [..., 1], in the order that `LANES` says."""
    *lead, k = x.shape
    blocks = -(-k // LANES)
    padded = np.zeros((*lead, blocks * LANES), np.float32)
    padded[..., :k] = x
    lanes = np.zeros((*lead, LANES), np.float32)
    for block in range(blocks):
        lanes = lanes + padded[..., block * LANES : (block + 1) * LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def layer_norm(x: F32, weight: F32 | None, bias: F32 | None, eps: float) -> F32:
    """y = f32(f32(f32(d * r) * weight) + bias), d = f32(x - m), m = sum(x) / K, r = 1 / sqrt(sum(d**2) / K + eps).

    x: float32 [..., K]; weight, bias: float32 [K] or None. Sums as in `row_sum`; the square root and the divisions are
    rounded once each. Without weight and bias, for K <= 4096, the error against float64 is below
    4e-7 * (1 + |m| / s + |y|), with s the root of the variance plus eps.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        centred = x - row_sum(x) / np.float32(x.shape[-1])
        return _scaled(centred, weight, bias, eps)


def rms_norm(x: F32, weight: F32 | None, bias: F32 | None, eps: float) -> F32:
    """y = f32(f32(f32(x * r) * weight) + bias), r = 1 / sqrt(sum(x**2) / K + eps): `layer_norm` without the mean.

    Without weight and bias the relative error against float64 is below 4e-7.
    """
    with np.errstate(all="ignore"):
        return _scaled(np.asarray(x, np.float32), weight, bias, eps)


def _scaled(x: F32, weight: F32 | None, bias: F32 | None, eps: float) -> F32:
    variance = row_sum(x * x) / np.float32(x.shape[-1])
    y: F32 = x * (np.float32(1) / np.sqrt(variance + np.float32(eps)))
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


NORMS: dict[str, Callable[[F32, F32 | None, F32 | None, float], F32]] = {"layer_norm": layer_norm, "rms_norm": rms_norm}


def norm(x: F32, kind: str, weight: F32 | None, bias: F32 | None, eps: float) -> F32:
    """y = norm(x), float32 [..., K], rounded in steps of a fixed order; kind: a key of `NORMS`."""
    return NORMS[kind](x, weight, bias, eps)


def norm_quantize(
    x: F32,
    kind: str,
    weight: F32 | None,
    bias: F32 | None,
    eps: float,
    scale: float,
    zero_point: int,
    factor: F32 | None = None,
) -> U8:
    """q_y = quantize(norm(x) [* factor], scale, zero_point); kind: a key of `NORMS`, factor: float32 [K]."""
    return norm_and_quantize(x, kind, weight, bias, eps, scale, zero_point, factor)[1]


def norm_and_quantize(
    x: F32,
    kind: str,
    weight: F32 | None,
    bias: F32 | None,
    eps: float,
    scale: float,
    zero_point: int,
    factor: F32 | None = None,
) -> tuple[F32, U8]:
    """y = norm(x) and q_y = norm_quantize(x): the float32 result, and its integers."""
    y = norm(x, kind, weight, bias, eps)
    return y, quantize(y if factor is None else y * factor, scale, zero_point)

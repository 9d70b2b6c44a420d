"""Upsampling of integers: neighbours are copied, a bilinear mean is taken in float32 steps and rounded once.

A mean of values of one scale and zero point has that scale and zero point, so neither is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, U8, round_clamp

Ints = Sequence[int]


def source_step(size: int, out: int, scale: float, align_corners: bool) -> np.float32:
    """Source pixels per output pixel: f32(1 / scale), or f32(f32(size) / f32(out)) where scale is 0.

    With `align_corners` f32(f32(size - 1) / f32(out - 1)), 0 for a single output.
    """
    if align_corners:
        return np.float32(0) if out <= 1 else np.float32(size - 1) / np.float32(out - 1)
    return np.float32(1.0 / scale) if scale else np.float32(size) / np.float32(out)


def qupsample_nearest(q_x: U8, size: Ints, scales: Sequence[float]) -> U8:
    """q_y[..., o] = q_x[..., min(floor(f32(o * step)), size - 1)] in every spatial dimension, as torch has it.

    q_x: uint8 [B, C, *spatial]; size: the result's; scales: per dimension, 0 for size / input size (`source_step`).
    """
    for axis, (out, scale) in enumerate(zip(size, scales, strict=True), start=2):
        step = source_step(q_x.shape[axis], out, scale, False)
        source = np.floor(np.arange(out, dtype=np.float32) * step).astype(np.int64)
        q_x = np.take(q_x, np.minimum(source, q_x.shape[axis] - 1), axis)
    return q_x


def _neighbours(
    size: int, out: int, scale: float, align_corners: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F32, F32]:
    """Per output: the two inputs it lies between and the weights of both, which add up to 1."""
    step = source_step(size, out, scale, align_corners)
    o = np.arange(out, dtype=np.float32)
    place = o * step if align_corners else np.maximum((o + np.float32(0.5)) * step - np.float32(0.5), np.float32(0))
    first = np.minimum(place.astype(np.int64), size - 1)
    weight = np.clip(place - first.astype(np.float32), np.float32(0), np.float32(1))
    return first, np.minimum(first + 1, size - 1), np.float32(1) - weight, weight


def qupsample_bilinear(q_x: U8, size: Ints, scales: Sequence[float], align_corners: bool) -> U8:
    """q_y = rne(f32(f32(t * u0) + f32(b * u1))), t = f32(f32(q00 * v0) + f32(q01 * v1)), b likewise one row below.

    v0, v1: weights of the pixels to the left and right, u0, u1 of the rows above and below; q_x: uint8 [B, C, H, W].
    An output's place in the input is max(f32(f32((o + 0.5) * step) - 0.5), 0), with `align_corners` f32(o * step).
    """
    (top, bottom, u0, u1), (left, right, v0, v1) = (
        _neighbours(n, out, scale, align_corners) for n, out, scale in zip(q_x.shape[2:], size, scales, strict=True)
    )
    x = q_x.astype(np.float32)
    rows: F32 = x[..., left] * v0 + x[..., right] * v1
    mean: F32 = rows[:, :, top] * u0[:, None] + rows[:, :, bottom] * u1[:, None]
    return round_clamp(mean, 0, 0, 255)

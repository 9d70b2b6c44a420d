"""Upsampling of integers: neighbours are copied, a bilinear mean is rounded once.

The mean is taken in float32 steps or, without floats, with weights of 11 bits and places of 32 bits behind the point.

A mean of values of one scale and zero point has that scale and zero point, so neither is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, U8, round_clamp

Ints = Sequence[int]
Index = npt.NDArray[np.int64]


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


def _neighbours(size: int, out: int, scale: float, align_corners: bool) -> tuple[Index, Index, F32, F32]:
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
    An output's place in the input is max(f32(f32((o + 0.5) * step) - 0.5), 0), with `align_corners` f32(o * step);
    v1 = place - floor(place), v0 = f32(1 - v1), and right of the last pixel is that pixel again. step: `source_step`.
    """
    (top, bottom, u0, u1), (left, right, v0, v1) = (
        _neighbours(n, out, scale, align_corners) for n, out, scale in zip(q_x.shape[2:], size, scales, strict=True)
    )
    x = q_x.astype(np.float32)
    rows: F32 = x[..., left] * v0 + x[..., right] * v1
    mean: F32 = rows[:, :, top] * u0[:, None] + rows[:, :, bottom] * u1[:, None]
    return round_clamp(mean, 0, 0, 255)


WEIGHT_BITS = 11
"""Of an integer weight of a mean: two of them and a uint8 make 30 bits."""


def fixed_step(factor: float) -> int:
    """Source pixels per output pixel in steps of 2**-32: rne(2**32 / factor), or 0 for a factor of 0."""
    return round(2.0**32 / factor) if factor else 0


def _fixed_neighbours(size: int, out: int, step: int, align_corners: bool) -> tuple[Index, Index, Index, Index]:
    """As `_neighbours`, with integer weights that add up to 2**11."""
    if align_corners:
        step = 0 if out <= 1 else (((size - 1) << 33) // (out - 1) + 1) >> 1
    elif not step:
        step = ((size << 33) // max(out, 1) + 1) >> 1
    o = np.arange(out, dtype=np.int64)
    place = o * step if align_corners else np.maximum(((2 * o + 1) * step >> 1) - (1 << 31), 0)
    first = np.minimum(place >> 32, size - 1)
    weight = ((place & 0xFFFFFFFF) + (1 << 31 - WEIGHT_BITS)) >> 32 - WEIGHT_BITS
    return first, np.minimum(first + 1, size - 1), (1 << WEIGHT_BITS) - weight, weight


def qupsample_bilinear_fixed(q_x: U8, size: Ints, steps: Ints, align_corners: bool) -> U8:
    """q_y = (t * u0 + b * u1 + 2**21) >> 22, t = q00 * v0 + q01 * v1, b likewise one row below; integers throughout.

    The weights are those of `qupsample_bilinear` in steps of 2**-11, of an output's place in the input in steps of
    2**-32: max(((2 * o + 1) * step >> 1) - 2**31, 0), with `align_corners` o * step. steps: per dimension
    (`fixed_step`), 0 for the quotient of the sizes, which `align_corners` always takes, of both less one.
    """
    (top, bottom, u0, u1), (left, right, v0, v1) = (
        _fixed_neighbours(n, out, step, align_corners) for n, out, step in zip(q_x.shape[2:], size, steps, strict=True)
    )
    x = q_x.astype(np.int64)
    rows: Index = x[..., left] * v0 + x[..., right] * v1
    mean: Index = rows[:, :, top] * u0[:, None] + rows[:, :, bottom] * u1[:, None]
    return ((mean + (1 << 2 * WEIGHT_BITS - 1)) >> 2 * WEIGHT_BITS).astype(np.uint8)

"""Pooling: sums are exact integers, an average is rounded once; the largest of a window is one of its integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import U8, round_clamp
from fxq.numerics.fixed_point import I64, ROUNDINGS, clamp_integers, mean_multiplier

Ints = Sequence[int]
Index = npt.NDArray[np.int64]


def pool_sizes(sizes: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool) -> list[int]:
    """The spatial sizes of a pooling's result; `ceil_mode` counts a last window that reaches beyond the padding.

    No window begins in the padding after the input, as in torch.
    """
    found = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil_mode else room // s) + 1
        found.append(count - 1 if ceil_mode and (count - 1) * s >= size + p else count)
    return found


Windows = tuple[Index, Index, Index]
"""Along one dimension: where each window begins and ends in the input, and how many values it counts."""


def pool_windows(size: int, out: int, k: int, s: int, p: int, count_include_pad: bool) -> Windows:
    """Windows of k values, one every s, from -p on."""
    begin = np.arange(out) * s - p
    end = np.minimum(begin + k, size + p)
    inside = np.clip(begin, 0, size), np.clip(end, 0, size)
    return *inside, (end - begin if count_include_pad else inside[1] - inside[0])


def adaptive_windows(size: int, out: int) -> Windows:
    """Windows from floor(i * size / out) to ceil((i + 1) * size / out)."""
    i = np.arange(out)
    begin, end = i * size // out, -(-(i + 1) * size // out)
    return begin, end, end - begin


def _sums(q_x: U8, windows: Sequence[Windows], divisor: int | None, z_x: int) -> tuple[I64, I64]:
    """The sums of q_x - z_x over each window, and what they are divided by."""
    acc, count = q_x.astype(np.int64) - z_x, np.ones(1, np.int64)
    for axis, (begin, end, counted) in enumerate(windows, start=2):
        sums = np.insert(np.cumsum(acc, axis), 0, 0, axis)
        acc = np.take(sums, end, axis) - np.take(sums, begin, axis)
        count = count[..., None] * counted
    return acc, count[0] if divisor is None else np.full_like(count[0], divisor)


def _average(
    q_x: U8,
    windows: Sequence[Windows],
    divisor: int | None,
    z_x: int,
    multiplier: float,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    acc, divisors = _sums(q_x, windows, divisor, z_x)
    m = (np.float64(multiplier) / divisors).astype(np.float32)
    return round_clamp(acc.astype(np.float32) * m, zero_point, low, high)


def _average_fixed(
    q_x: U8,
    windows: Sequence[Windows],
    divisor: int | None,
    z_x: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str,
) -> U8:
    acc, divisors = _sums(q_x, windows, divisor, z_x)
    scale = mean_multiplier(multiplier, shift, divisors)
    return clamp_integers(ROUNDINGS[rounding](acc, *scale), zero_point, low, high)


def qavg_pool(
    q_x: U8,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    z_x: int,
    multiplier: float,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    """q_y = clamp(rne(f32(f32(acc) * f32(m / count))) + z_y, low, high), acc = sum over the window of q_x - z_x.

    m = s_x / s_y in float64; count: the values of the window inside the input or, with `count_include_pad`, inside the
    padding (which hold 0.0 and add nothing); `divisor_override` replaces it. q_x: uint8 [B, C, *spatial]; padding: one
    number per spatial dimension, as in torch.
    """
    windows = _all_windows(q_x, kernel, stride, padding, ceil_mode, count_include_pad)
    return _average(q_x, windows, divisor_override, z_x, multiplier, zero_point, low, high)


def qavg_pool_fixed(
    q_x: U8,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    z_x: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """q_y = clamp(scale(acc, *mean_multiplier(multiplier, shift, count)) + z_y, low, high), else as `qavg_pool`."""
    windows = _all_windows(q_x, kernel, stride, padding, ceil_mode, count_include_pad)
    rest = z_x, multiplier, shift, zero_point, low, high, rounding
    return _average_fixed(q_x, windows, divisor_override, *rest)


def _all_windows(
    q_x: U8, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, count_include_pad: bool
) -> list[Windows]:
    sizes = pool_sizes(q_x.shape[2:], kernel, stride, padding, [1] * len(kernel), ceil_mode)
    geometry = zip(q_x.shape[2:], sizes, kernel, stride, padding, strict=True)
    return [pool_windows(*own, count_include_pad) for own in geometry]


def qadaptive_avg_pool(
    q_x: U8, output_size: Ints, z_x: int, multiplier: float, zero_point: int, low: int, high: int
) -> U8:
    """`qavg_pool` over windows from floor(i * size / output) to ceil((i + 1) * size / output); [1, ...] is the mean."""
    windows = [adaptive_windows(size, out) for size, out in zip(q_x.shape[2:], output_size, strict=True)]
    return _average(q_x, windows, None, z_x, multiplier, zero_point, low, high)


def qadaptive_avg_pool_fixed(
    q_x: U8,
    output_size: Ints,
    z_x: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """`qavg_pool_fixed` over the windows of `qadaptive_avg_pool`."""
    windows = [adaptive_windows(size, out) for size, out in zip(q_x.shape[2:], output_size, strict=True)]
    return _average_fixed(q_x, windows, None, z_x, multiplier, shift, zero_point, low, high, rounding)


def qmax_pool(q_x: U8, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool) -> U8:
    """The largest integer of each window; what is padded holds 0, the smallest. padding: one number per dimension."""
    y: U8 = max_of_windows(q_x, kernel, stride, padding, dilation, ceil_mode, 0, np.maximum)
    return y


def max_of_windows(
    x: npt.NDArray[Any],
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    lowest: float,
    larger: Callable[[Any, Any], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """The largest value of each window over the last dimensions of `x` by `larger`, of `lowest` where it is padded.

    Raises `ValueError` where a window is larger than the padded input.
    """
    rank = len(kernel)
    sizes = pool_sizes(x.shape[-rank:], kernel, stride, padding, dilation, ceil_mode)
    if min(sizes) < 1:
        raise ValueError(f"its input of sizes {list(x.shape[-rank:])} is smaller than the pooling window")
    widths = [(0, 0)] * (x.ndim - rank)
    for n, k, s, p, d, count in zip(x.shape[-rank:], kernel, stride, padding, dilation, sizes, strict=True):
        widths.append((p, max((count - 1) * s + d * (k - 1) + 1 - n - p, 0)))
    padded = np.pad(x, widths, constant_values=lowest)
    y: npt.NDArray[Any] = np.full((*x.shape[:-rank], *sizes), lowest, x.dtype)
    for position in itertools.product(*map(range, kernel)):
        starts = [p * d for p, d in zip(position, dilation, strict=True)]
        window: list[Any] = [slice(b, b + s * (n - 1) + 1, s) for b, s, n in zip(starts, stride, sizes, strict=True)]
        y = larger(y, padded[(..., *window)])
    return y

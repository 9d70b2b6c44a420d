"""quantize, dequantize, requantize as torch ops: where real numbers become integers, and back.

    quantize     q = clamp(rne(f32(x * f32(1 / scale))) + zero_point, 0, 255)              float32 -> uint8, any shape
    quantize_channels_last   the same of [B, C, *spatial], into memory with the channels innermost
    dequantize   x = f32(scale * (q - zero_point))                                         uint8 -> float32
    requantize   q_y = clamp(rne(f32((q - z_x) * m)) + z_y, low, high), m = f32(s_x / s_y)  uint8 -> uint8
    quantize_weight, dequantize_weight: symmetric int8, one scale per output channel or one in all.
    fake_quantize_rows: f32(s * (q - z)) of the quantized q of x, with s and z from each row of x itself.

The NumPy truth of each is the function of the same name in `fxq.numerics`. Results lie in memory as the inputs do where
those are contiguous or channels-last, else contiguous.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import channels_last, empty, laid_like
from fxq.observers import RoundedWeight, WeightObserver
from fxq.qtypes import ACT_QMAX, ACT_QMIN, WEIGHT_QMAX


def expect_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise `TypeError` unless the argument `name` of `op` has `dtype`."""
    if tensor.dtype != dtype:
        raise TypeError(f"fxq::{op}: {name} has dtype {tensor.dtype}, expected {dtype}")


def expect_fixed(op: str, rounding: str, multiplier: int, shift_low: int, shift_high: int) -> None:
    """Raise `ValueError` for a rounding, multiplier or shift that fixed point does not have."""
    if rounding not in numerics.ROUNDINGS:
        raise ValueError(f"fxq::{op}: rounding {rounding!r}, expected {' or '.join(numerics.ROUNDINGS)}")
    if not (0 <= multiplier < 2**31 and 0 <= shift_low <= shift_high <= 62):
        raise ValueError(f"fxq::{op}: multiplier {multiplier}, shift {shift_low}, expected 0..2**31 - 1 and 0..62")


def expect_fixed_channels(op: str, rounding: str, n: int, **operands: Tensor | None) -> None:
    """Raise unless `multiplier`, `shift` and all else that there is of `operands` are int32 [n]; see `expect_fixed`."""
    for name, operand in operands.items():
        if operand is not None:
            expect_dtype(op, name, operand, torch.int32)
            if operand.shape != (n,):
                raise ValueError(f"fxq::{op}: {name} has shape {list(operand.shape)}, expected [{n}]")
    multiplier, shift = operands["multiplier"], operands["shift"]
    if n and multiplier is not None and shift is not None:
        expect_fixed(op, rounding, int(multiplier.min()), int(shift.min()), int(shift.max()))


def scale_clamp(
    sums: Tensor, multiplier: Tensor, shift: Tensor, zero_point: int, low: int, high: int, rounding: str
) -> Tensor:
    """clamp(scale(sums, multiplier[n], shift[n]) + zero_point, low, high) as uint8; sums: integers [B, N, *spatial]."""
    v = sums.to(torch.int64).movedim(1, -1).numpy()
    steps = numerics.ROUNDINGS[rounding](v, multiplier.numpy(), shift.numpy())
    return channels_last(torch.from_numpy(numerics.clamp_integers(steps, zero_point, low, high)).movedim(-1, 1))


def round_clamp(steps: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """clamp(rne(steps) + zero_point, low, high) as uint8, clamped in float so that none overflows; NaN: low."""
    numbers = torch.nan_to_num(torch.round(steps), low - zero_point, torch.inf, -torch.inf)
    clamped = torch.clamp(numbers, low - zero_point, high - zero_point)
    return (clamped.to(torch.int32) + zero_point).to(torch.uint8)


def steps_from(q: Tensor, zero_point: int, multiplier: float) -> Tensor:
    """f32((q - zero_point) * f32(multiplier))."""
    return (q.to(torch.int32) - zero_point).to(torch.float32) * torch.tensor(multiplier, dtype=torch.float32)


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("quantize", "x", x, torch.float32)
    inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    return round_clamp(laid_like(x, x) * inverse, zero_point, ACT_QMIN, ACT_QMAX)


def _quantize_channels_last(x: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("quantize_channels_last", "x", x, torch.float32)
    if x.dim() < 2:
        raise ValueError(f"fxq::quantize_channels_last: x has shape {list(x.shape)}, expected [B, C, *spatial]")
    return channels_last(_quantize(x, scale, zero_point))


def _dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("dequantize", "q", q, torch.uint8)
    return steps_from(laid_like(q, q), zero_point, scale)


def _requantize(q: Tensor, z_x: int, multiplier: float, zero_point: int, low: int, high: int) -> Tensor:
    expect_dtype("requantize", "q", q, torch.uint8)
    return round_clamp(steps_from(laid_like(q, q), z_x, multiplier), zero_point, low, high)


AT_ONCE = 1 << 20
"""Weights that are in memory as float64 at a time."""


def _column(scales: Tensor, ndim: int) -> Tensor:
    return scales.reshape(-1, *[1] * (ndim - 1))


def _quantize_weight(w: Tensor, scales: Tensor) -> Tensor:
    q, column = w.new_empty(w.shape, dtype=torch.int8), _column(scales, w.ndim).to(torch.float64)
    some = max(1, AT_ONCE // max(1, w[:1].numel()))
    columns = column.expand(len(w), *column.shape[1:])
    for part, own, s in zip(*(torch.split(each, some) for each in (w, q, columns)), strict=True):
        own.copy_(part.to(torch.float64, copy=True).div_(s).round_().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX))
    return q


def _dequantize_weight(q: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    expect_dtype("dequantize_weight", "q", q, torch.int8)
    return q.to(torch.float32).mul_(_column(scales, q.ndim)).to(dtype)


def _fake_quantize_rows(x: Tensor) -> Tensor:
    expect_dtype("fake_quantize_rows", "x", x, torch.float32)
    return torch.from_numpy(numerics.fake_quantize_rows(x.detach().numpy()))


quantize = kernels.define(
    "quantize(Tensor x, float scale, int zero_point) -> Tensor",
    _quantize,
    lambda x, scale, zero_point: laid_like(x.new_empty(x.shape, dtype=torch.uint8), x),
)
dequantize = kernels.define(
    "dequantize(Tensor q, float scale, int zero_point) -> Tensor",
    _dequantize,
    lambda q, scale, zero_point: laid_like(q.new_empty(q.shape, dtype=torch.float32), q),
)
quantize_channels_last = kernels.define(
    "quantize_channels_last(Tensor x, float scale, int zero_point) -> Tensor",
    _quantize_channels_last,
    lambda x, scale, zero_point: empty(x, x.shape[1], x.shape[2:], torch.uint8),
)
requantize = kernels.define(
    "requantize(Tensor q, int z_x, float multiplier, int zero_point, int low, int high) -> Tensor",
    _requantize,
    lambda q, z_x, multiplier, zero_point, low, high: laid_like(q.new_empty(q.shape), q),
)
quantize_weight = kernels.define(
    "quantize_weight(Tensor w, Tensor scales) -> Tensor",
    _quantize_weight,
    lambda w, scales: w.new_empty(w.shape, dtype=torch.int8),
)
dequantize_weight = kernels.define(
    "dequantize_weight(Tensor q, Tensor scales, ScalarType dtype=float) -> Tensor",
    _dequantize_weight,
    lambda q, scales, dtype=torch.float32: q.new_empty(q.shape, dtype=dtype),
)
fake_quantize_rows = kernels.define(
    "fake_quantize_rows(Tensor x) -> Tensor", _fake_quantize_rows, lambda x: x.new_empty(x.shape)
)


def integer_bounds(bounds: tuple[float | None, float | None], scale: float, zero_point: int) -> tuple[int, int]:
    """Q(low), Q(high) in 0..255 of `bounds`, with Q = `numerics.quantize`; a missing bound is the end of the range.

    Rounding is monotone, so clamp(Q(x), Q(low), Q(high)) = Q(clamp(x, low, high)) bit for bit.
    """

    def q(value: float) -> int:
        return int(numerics.quantize(np.asarray(value, np.float32), scale, zero_point))

    low, high = bounds
    return (ACT_QMIN if low is None else q(low)), (ACT_QMAX if high is None else q(high))


def integers_of(observer: WeightObserver, w: Tensor) -> tuple[Tensor, Tensor]:
    """What the weight `w` becomes by its observer: integers of the shape of `w`, and their scales."""
    if isinstance(observer, RoundedWeight):
        return observer.integers, observer.scales
    scales = observer.scales_of(w)
    return quantize_weight(observer.scaled(w.detach()).contiguous(), scales), scales

"""Convolutions: the product of `fxq.numerics.linear` over windows, exact int32 sums, the same epilogues.

Activations are [B, C, *spatial] with one to three spatial dimensions, weights [N, C / groups, *kernel]; `padding` holds
two numbers per spatial dimension, before and after it. What is padded holds z_x, the integer that stands for 0.0, so
that `fold_bias` over the whole kernel is right at the borders as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxq.numerics.activations import ACTIVATIONS
from fxq.numerics.affine import F32, I8, I32, U8, Array, quantize, round_clamp
from fxq.numerics.fixed_point import ROUNDINGS, clamp_integers
from fxq.numerics.linear import fold_bias

Ints = Sequence[int]


def conv_sizes(sizes: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """Spatial sizes of the result: floor((size + padding - dilation * (kernel - 1) - 1) / stride) + 1."""
    return [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(sizes)
    ]


def pad(q_x: U8, padding: Ints, z_x: int) -> U8:
    """q_x with z_x around its spatial dimensions; a negative padding cuts off."""
    for axis, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True), start=2):
        stop = max(q_x.shape[axis] + min(after, 0), 0)
        q_x = np.take(q_x, range(min(max(-before, 0), stop), stop), axis)
        widths = [(0, 0)] * q_x.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        q_x = np.pad(q_x, widths, constant_values=z_x)
    return q_x


def taps(x: Array, kernel: Ints, stride: Ints, dilation: Ints, sizes: Ints) -> Iterator[tuple[Any, Array]]:
    """For each position in the kernel: what all windows hold there, as a view [B, C, *sizes] of the padded x."""
    for position in itertools.product(*map(range, kernel)):
        starts = [p * d for p, d in zip(position, dilation, strict=True)]
        window: list[Any] = [slice(b, b + s * (n - 1) + 1, s) for b, s, n in zip(starts, stride, sizes, strict=True)]
        yield position, x[(..., *window)]


def accumulate_conv(q_x: U8, q_w: I8, stride: Ints, padding: Ints, dilation: Ints, groups: int, z_x: int) -> I32:
    """acc[b, n, *o] = sum_{c, t} q_x[b, g * C / groups + c, *(o * stride - padding + t * dilation)] * q_w[n, c, *t].

    g = n // (N / groups) is the group of n; where the index lies outside, q_x is z_x. Exact: float64 holds every sum.
    """
    kernel, n = q_w.shape[2:], q_w.shape[0]
    sizes = conv_sizes(q_x.shape[2:], kernel, stride, padding, dilation)
    batch, points = q_x.shape[0], math.prod(sizes)
    acc = np.zeros((groups, batch * points, n // groups))
    for position, window in taps(pad(q_x, padding, z_x), kernel, stride, dilation, sizes):
        rows = np.moveaxis(window.reshape(batch, groups, q_w.shape[1], points), 0, 2)
        w = q_w[(..., *position)].reshape(groups, n // groups, q_w.shape[1]).astype(np.float64)
        acc += rows.reshape(groups, q_w.shape[1], batch * points).transpose(0, 2, 1).astype(np.float64) @ w.transpose(
            0, 2, 1
        )
    shaped = acc.transpose(0, 2, 1).reshape(n, batch, *sizes)
    return np.ascontiguousarray(np.moveaxis(shaped, 0, 1)).astype(np.int32)


def _column(values: Any, ndim: int) -> Any:
    """One value a channel, for images of so many dimensions."""
    return values.reshape(-1, *[1] * (ndim - 2))


def _steps(acc: I32, bias: I32, multiplier: F32) -> F32:
    """f32(f32(acc + bias) * m), channel by channel."""
    y: F32 = (acc + _column(bias, acc.ndim)).astype(np.float32) * _column(multiplier, acc.ndim)
    return y


def _plus(y: F32, addend: F32 | None) -> F32:
    if addend is None:
        return y
    return y + (addend.reshape(-1, *[1] * (y.ndim - 2)) if addend.ndim == 1 else addend)


@dataclass(frozen=True)
class Conv:
    """How a convolution goes over its input; see `accumulate_conv`."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    z_x: int

    def accumulate(self, q_x: U8, q_w: I8) -> I32:
        return accumulate_conv(q_x, q_w, self.stride, self.padding, self.dilation, self.groups, self.z_x)


def qconv(q_x: U8, q_w: I8, bias: I32, multiplier: F32, conv: Conv, zero_point: int, low: int, high: int) -> U8:
    """q_y = clamp(rne(f32(f32(acc + bias) * m)) + z_y, low, high), as `qlinear` of every window.

    q_x: uint8 [B, C, *spatial]; q_w: int8 [N, C / groups, *kernel]; bias: int32 [N], `fold_bias` over the whole kernel;
    multiplier: float32 [N].
    """
    return round_clamp(_steps(conv.accumulate(q_x, q_w), bias, multiplier), zero_point, low, high)


def qconv_fixed(
    q_x: U8,
    q_w: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    conv: Conv,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """q_y = clamp(scale(acc + bias, multiplier, shift) + z_y, low, high), as `qlinear_fixed` of every window."""
    acc = conv.accumulate(q_x, q_w)
    scale = _column(multiplier, acc.ndim), _column(shift, acc.ndim)
    v = acc.astype(np.int64) + _column(bias, acc.ndim)
    return clamp_integers(ROUNDINGS[rounding](v, *scale), zero_point, low, high)


def qconv_float(q_x: U8, q_w: I8, bias: I32, multiplier: F32, conv: Conv, addend: F32 | None = None) -> F32:
    """y = f32(f32(acc + bias) * m), then f32(y + addend); addend: float32 [N] or [B, N, *out]."""
    return _plus(_steps(conv.accumulate(q_x, q_w), bias, multiplier), addend)


def qconv_act_quantize(
    q_x: U8, q_w: I8, bias: I32, multiplier: F32, conv: Conv, activation: str, scale: float, zero_point: int
) -> U8:
    """q_y = quantize(act(qconv_float(...)), scale, zero_point); activation: a key of `ACTIVATIONS`."""
    return quantize(ACTIVATIONS[activation](qconv_float(q_x, q_w, bias, multiplier, conv)), scale, zero_point)


def qconv_add(
    q_x: U8,
    q_w: I8,
    bias: I32,
    multiplier: F32,
    conv: Conv,
    q_b: U8,
    m_b: float,
    z_b: int,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    """q_y = clamp(rne(f32(f32(f32(acc + bias) * m) + f32((q_b - z_b) * m_b))) + z_y, low, high).

    A residual, added before the one rounding to steps of s_y: m = f32(s_x * s_w / s_y), m_b = f32(s_b / s_y).
    q_b: uint8 of the shape of the result.
    """
    added = (q_b.astype(np.int32) - z_b).astype(np.float32) * np.float32(m_b)
    return round_clamp(_steps(conv.accumulate(q_x, q_w), bias, multiplier) + added, zero_point, low, high)


# Transposed convolutions: output o = i * stride - padding + t * dilation. All outputs with the same o mod stride read
# the same taps t, at a distance from one another: for each such phase the transposed convolution is an ordinary one.


@dataclass(frozen=True)
class Phase:
    """One of the ordinary convolutions that a transposed one consists of; entries are per spatial dimension.

    first: its outputs are first, first + stride, ...; sizes: how many; taps: the taps of the whole kernel that it uses,
    in the order in which the windows meet them; padding: before and after the input; dilation: of its windows.
    """

    first: tuple[int, ...]
    sizes: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def select(self, q_w: I8) -> I8:
        """Its weight, [N, C / groups, *len(taps)], of the whole one [N, C / groups, *kernel]."""
        for axis, taps_ in enumerate(self.taps, start=2):
            q_w = np.take(q_w, taps_, axis)
        return q_w


def transposed_sizes(
    sizes: Ints, kernel: Ints, stride: Ints, padding: Ints, output_padding: Ints, dilation: Ints
) -> list[int]:
    """(size - 1) * stride - padding + dilation * (kernel - 1) + output_padding + 1."""
    return [
        (size - 1) * stride[i]
        - padding[2 * i]
        - padding[2 * i + 1]
        + dilation[i] * (kernel[i] - 1)
        + output_padding[i]
        + 1
        for i, size in enumerate(sizes)
    ]


def phases(sizes: Ints, kernel: Ints, stride: Ints, padding: Ints, output_padding: Ints, dilation: Ints) -> list[Phase]:
    """The phases of a transposed convolution, the last spatial dimension fastest. sizes: those of the input."""
    out = transposed_sizes(sizes, kernel, stride, padding, output_padding, dilation)
    dims = []
    for i, size in enumerate(sizes):
        s, d, begin = stride[i], dilation[i], padding[2 * i]
        dim = []
        for first in range(s):
            own = tuple(t for t in reversed(range(kernel[i])) if (first + begin - t * d) % s == 0)
            step = d // math.gcd(s, d)
            count = max(-(-(out[i] - first) // s), 0)
            start = (first + begin - own[0] * d) // s if own else 0  # the input that the first window begins at
            after = count - 1 + start + (len(own) - 1) * step - (size - 1) if own else count - 1 - size
            dim.append((first, count, own, (-start, after), step))
        dims.append(dim)
    return [
        Phase(
            tuple(part[0] for part in parts),
            tuple(part[1] for part in parts),
            tuple(part[2] for part in parts),
            tuple(edge for part in parts for edge in part[3]),
            tuple(part[4] for part in parts),
        )
        for parts in itertools.product(*dims)
    ]


def fold_transposed_bias(
    bias: F32 | None, q_w: I8, s_x: float, z_x: int, s_w: F32, stride: Ints, padding: Ints, dilation: Ints
) -> npt.NDArray[np.int64]:
    """`fold_bias` of every phase, whose windows see its own taps only: int64 [phases, N]."""
    kernel = q_w.shape[2:]
    ones = [1] * len(kernel)
    rows = phases(ones, kernel, stride, padding, [0] * len(kernel), dilation)
    return np.stack([fold_bias(bias, phase.select(q_w).reshape(len(q_w), -1), s_x, z_x, s_w) for phase in rows])


@dataclass(frozen=True)
class ConvTranspose:
    """How a transposed convolution goes over its input; see `phases`. Entries are per spatial dimension."""

    stride: Ints
    padding: Ints
    output_padding: Ints
    dilation: Ints
    groups: int
    z_x: int

    def sums(self, q_x: U8, q_w: I8, bias: I32) -> I32:
        """acc + bias[phase] of every output."""
        geometry = (q_x.shape[2:], q_w.shape[2:], self.stride, self.padding, self.output_padding, self.dilation)
        y = np.zeros((q_x.shape[0], len(q_w), *transposed_sizes(*geometry)), np.int32)
        ones = [1] * len(self.stride)
        for phase, own in zip(phases(*geometry), bias, strict=True):
            if not all(phase.sizes):
                continue
            if all(phase.taps):
                w = phase.select(q_w)
                acc = accumulate_conv(q_x, w, ones, phase.padding, phase.dilation, self.groups, self.z_x)
            else:
                acc = np.zeros((q_x.shape[0], len(q_w), *phase.sizes), np.int32)
            where: list[Any] = [slice(first, None, s) for first, s in zip(phase.first, self.stride, strict=True)]
            y[(..., *where)] = acc + _column(own, acc.ndim)
        return y

    def steps(self, q_x: U8, q_w: I8, bias: I32, multiplier: F32) -> F32:
        """f32(f32(acc + bias[phase]) * m) of every output."""
        y: F32 = self.sums(q_x, q_w, bias).astype(np.float32) * _column(multiplier, q_x.ndim)
        return y


def qconv_transpose(
    q_x: U8, q_w: I8, bias: I32, multiplier: F32, conv: ConvTranspose, zero_point: int, low: int, high: int
) -> U8:
    """q_y = clamp(rne(f32(f32(acc + bias[phase]) * m)) + z_y, low, high).

    acc[b, n, *o] = sum of q_x[b, c, *i] * q_w[n, c, *t] over c and the t with o = i * stride - padding + t * dilation,
    q_x being z_x outside. q_w: int8 [N, C / groups, *kernel], the output channels first; bias: int32 [phases, N]
    (`fold_transposed_bias`), the phase of o being o mod stride.
    """
    return round_clamp(conv.steps(q_x, q_w, bias, multiplier), zero_point, low, high)


def qconv_transpose_fixed(
    q_x: U8,
    q_w: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    conv: ConvTranspose,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """q_y = clamp(scale(acc + bias[phase], multiplier, shift) + z_y, low, high), else as `qconv_transpose`."""
    v = conv.sums(q_x, q_w, bias).astype(np.int64)
    scale = _column(multiplier, v.ndim), _column(shift, v.ndim)
    return clamp_integers(ROUNDINGS[rounding](v, *scale), zero_point, low, high)


def qconv_transpose_float(
    q_x: U8, q_w: I8, bias: I32, multiplier: F32, conv: ConvTranspose, addend: F32 | None = None
) -> F32:
    """y = f32(f32(acc + bias[phase]) * m), then f32(y + addend); addend: float32 [N] or [B, N, *out]."""
    return _plus(conv.steps(q_x, q_w, bias, multiplier), addend)

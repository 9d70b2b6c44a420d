"""conv_transpose: an upsampling convolution, as the ordinary ones that it consists of, one per phase of the stride.

    acc[b, n, *o] = sum_{c, t: o = i * stride - padding + t * dilation} q_x[b, c, *i] * q_w[n, c, *t]     exact int32
    qconv_transpose        q_y = clamp(rne(f32(acc + bias_i32[phase]) * f32(s_x * s_w[n] / s_y)) + z_y, low, high) -> uint8
    qconv_transpose_float  y   = f32(acc + bias_i32[phase]) * f32(s_x * s_w[n]) [+ addend]                       -> float32

x: uint8 [B, C, *spatial]; weight: int8, packed (`numerics.pack_transposed`); bias: int32 [phases, N]
(`numerics.fold_transposed_bias`): the outputs o with one o mod stride, a phase, all see the same taps, and only those
are folded; multiplier: float32 [N]; padding: two numbers per spatial dimension. Results are channels-last in memory.
NumPy truth: the functions of the same names in `fxq.numerics`.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import channels_last, empty
from fxq.qdq import expect_dtype, round_clamp

Ints = Sequence[int]


def _accumulate(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
    z_x: int,
) -> Tensor:
    """f32(acc + bias[phase]) * multiplier, in float64 up to the one rounding to float32.

    A sum over x - z_x, with the part of the bias that folds z_x taken out again: torch has no padding with z_x here.
    """
    expect_dtype(op, "x", x, torch.uint8)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "bias", bias, torch.int32)
    expect_dtype(op, "multiplier", multiplier, torch.float32)
    n, rank = multiplier.shape[0], len(kernel)
    if x.dim() != rank + 2 or len(padding) != 2 * rank or x.shape[1] % groups or n % groups:
        raise ValueError(f"fxq::{op}: x {list(x.shape)}, kernel {kernel}, padding {padding}, groups {groups}, N {n}")
    if bias.shape != (math.prod(stride), n):
        raise ValueError(f"fxq::{op}: bias has shape {list(bias.shape)}, expected {[math.prod(stride), n]}")
    geometry = (n, x.shape[1] // groups, kernel, stride, padding, dilation, groups)
    size = numerics.packed_transposed_size(*geometry)
    if weight.dim() != 1 or weight.numel() != size:
        raise ValueError(f"fxq::{op}: a packed weight of shape {list(weight.shape)}, expected [{size}]")
    q_w = numerics.unpack_transposed(weight.numpy(), *geometry)
    y = torch.zeros(x.shape[0], n, *_sizes(x, kernel, stride, padding, output_padding, dilation))
    ones = [1] * rank
    column = (-1, *ones)
    parts = numerics.phases(x.shape[2:], kernel, stride, padding, output_padding, dilation)
    for phase, own in zip(parts, bias, strict=True):
        if not all(phase.sizes):
            continue
        acc = torch.zeros(x.shape[0], n, *phase.sizes, dtype=torch.float64)
        if all(phase.taps):
            w = torch.from_numpy(phase.select(q_w)).to(torch.float64)
            widths = [edge for i in reversed(range(rank)) for edge in phase.padding[2 * i : 2 * i + 2]]
            padded = F.pad(x.to(torch.float64), widths, value=float(z_x))
            acc = (F.conv1d, F.conv2d, F.conv3d)[rank - 1](padded, w, None, ones, 0, phase.dilation, groups)
        where: list[Any] = [slice(first, None, s) for first, s in zip(phase.first, stride, strict=True)]
        y[(..., *where)] = (acc + own.view(column)).to(torch.float32) * multiplier.view(column)
    return channels_last(y)


def _sizes(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, output_padding: Ints, dilation: Ints) -> list[int]:
    return numerics.transposed_sizes(x.shape[2:], kernel, stride, padding, output_padding, dilation)


def _qconv_transpose(*args: Any) -> Tensor:
    *operands, zero_point, low, high = args
    return round_clamp(_accumulate("qconv_transpose", *operands), zero_point, low, high)


def _qconv_transpose_float(*args: Any) -> Tensor:
    addend = args[11] if len(args) > 11 else None  # the dispatcher drops what equals its default
    y = _accumulate("qconv_transpose_float", *args[:11])
    if addend is None:
        return y
    added: Tensor = addend.view(-1, *[1] * (y.dim() - 2)) if addend.dim() == 1 else addend
    return y + added


def _define(name: str, portable: Any, epilogue: str, dtype: torch.dtype) -> torch._ops.OpOverload:
    def fake(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, *rest: Any) -> Tensor:
        return empty(x, multiplier.shape[0], _sizes(x, *rest[:5]), dtype)

    operands = "Tensor x, Tensor weight, Tensor bias, Tensor multiplier"
    geometry = "int[] kernel, int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, int z_x"
    return kernels.define(f"{name}({operands}, {geometry}, {epilogue}) -> Tensor", portable, fake)


qconv_transpose = _define("qconv_transpose", _qconv_transpose, "int zero_point, int low, int high", torch.uint8)
qconv_transpose_float = _define("qconv_transpose_float", _qconv_transpose_float, "Tensor? addend=None", torch.float32)

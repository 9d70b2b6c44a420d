"""pool: averages and maxima over windows of a channels-last tensor.

    acc = sum over the window of q_x - z_x, what is padded adding nothing                                   exact int32
    qavg_pool            q_y = clamp(rne(f32(f32(acc) * f32(m / count))) + z_y, low, high), m = s_x / s_y      -> uint8
    qadaptive_avg_pool   the same over windows floor(i * size / output) to ceil((i + 1) * size / output)       -> uint8
    qmax_pool            q_y = the largest q_x of the window; what is padded holds 0                           -> uint8

x: uint8 [B, C, *spatial]; padding: one number per spatial dimension; count: the values of the window inside the input,
or inside the padding with `count_include_pad`. Maxima keep the scale and zero point of x. Results are channels-last in
memory. NumPy truth: the functions of the same names in `fxq.numerics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import empty, from_numpy
from fxq.qdq import expect_dtype

Ints = Sequence[int]


def _portable(name: str) -> Any:
    """NumPy itself: sums and maxima of integers have one value only."""
    function = getattr(numerics, name)

    def run(x: Tensor, *args: Any) -> Tensor:
        expect_dtype(name, "x", x, torch.uint8)
        if x.dim() != 2 + len(args[0]):
            raise ValueError(f"fxq::{name}: x has shape {list(x.shape)}, expected [B, C] and {len(args[0])} sizes")
        return from_numpy(function(x.numpy(), *args))

    return run


def _fake_avg_pool(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, *rest: Any) -> Tensor:
    ones = [1] * len(kernel)
    return empty(x, x.shape[1], numerics.pool_sizes(x.shape[2:], kernel, stride, padding, ones, ceil_mode), x.dtype)


qavg_pool = kernels.define(
    "qavg_pool(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override, int z_x, float multiplier, int zero_point, int low, int high) -> Tensor",
    _portable("qavg_pool"),
    _fake_avg_pool,
)
qadaptive_avg_pool = kernels.define(
    "qadaptive_avg_pool(Tensor x, int[] output_size, int z_x, float multiplier, int zero_point, int low, int high) "
    "-> Tensor",
    _portable("qadaptive_avg_pool"),
    lambda x, output_size, *rest: empty(x, x.shape[1], output_size, x.dtype),
)
qmax_pool = kernels.define(
    "qmax_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    _portable("qmax_pool"),
    lambda x, kernel, stride, padding, dilation, ceil_mode: empty(
        x, x.shape[1], numerics.pool_sizes(x.shape[2:], kernel, stride, padding, dilation, ceil_mode), x.dtype
    ),
)

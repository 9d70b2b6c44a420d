"""fixed_point: the integer ops without a float multiply, for `Recipe(requant="fixed")`.

    qlinear_fixed      q_y = clamp(scale(acc + bias_i32 - z_w * sum_k q_x[k], multiplier[n], shift[n]) + z_y, low, high)
    requantize_fixed   q_y = clamp(scale(q - z_x, multiplier, shift) + z_y, low, high)
    qadd_fixed         q_y = clamp(((q_a - z_a) * m_a + (q_b - z_b) * m_b + 2**(shift - 1) >> shift) + z_y, low, high)
    qmul_fixed         q_y = clamp(scale((q_a - z_a) * (q_b - z_b), multiplier, shift) + z_y, low, high)

    scale(v, multiplier, shift) ~ v * multiplier * 2**-shift, rounded in one of two ways:
    "single"   v * multiplier + 2**(shift - 1) >> shift                        one rounding, ties towards plus infinity
    "tflite"   gemmlowp's doubling high multiply, then its rounding shift      two roundings

multiplier: int32, a Q31 mantissa in 2**30..2**31 - 1, or 0; shift: int32, 0..62; z_w: int32 [N], the zero points of
affine weights, none where they are symmetric. All else as in qlinear, qadd, qmul and requantize, whose places they take
(`passes/use_fixed_point.py`). The products are exact in int64. NumPy truth: `fxq.numerics.fixed_point`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import empty_pair, laid_like
from fxq.qdq import expect_dtype, expect_fixed, expect_fixed_channels


def _tensor(array: numerics.U8) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _qlinear_fixed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
    zero_w: Tensor | None = None,
) -> Tensor:
    expect_dtype("qlinear_fixed", "x", x, torch.uint8)
    expect_dtype("qlinear_fixed", "weight", weight, torch.int8)
    n = bias.numel()
    fixed = {"bias": bias, "multiplier": multiplier, "shift": shift, "zero_w": zero_w}
    expect_fixed_channels("qlinear_fixed", rounding, n, **fixed)
    if weight.shape != (numerics.packed_size(n, x.shape[-1]),):
        raise ValueError(f"fxq::qlinear_fixed: a packed weight of shape {list(weight.shape)} does not fit x and bias")
    operands = (x.numpy(), numerics.unpack(weight.numpy(), n, x.shape[-1]), bias.numpy(), multiplier.numpy())
    zeros = None if zero_w is None else zero_w.numpy()
    return _tensor(numerics.qlinear_fixed(*operands, shift.numpy(), zero_point, low, high, rounding, zeros))


def _requantize_fixed(
    q: Tensor, z_x: int, multiplier: int, shift: int, zero_point: int, low: int, high: int, rounding: str = "single"
) -> Tensor:
    expect_dtype("requantize_fixed", "q", q, torch.uint8)
    expect_fixed("requantize_fixed", rounding, multiplier, shift, shift)
    y = _tensor(numerics.requantize_fixed(q.numpy(), z_x, multiplier, shift, zero_point, low, high, rounding))
    return laid_like(y, q)


def _qadd_fixed(
    a: Tensor, b: Tensor, m_a: int, z_a: int, m_b: int, z_b: int, shift: int, zero_point: int, low: int, high: int
) -> Tensor:
    expect_dtype("qadd_fixed", "a", a, torch.uint8)
    expect_dtype("qadd_fixed", "b", b, torch.uint8)
    for multiplier in (m_a, m_b):
        expect_fixed("qadd_fixed", "single", multiplier, shift, shift)
    y = _tensor(numerics.qadd_fixed(a.numpy(), b.numpy(), m_a, z_a, m_b, z_b, shift, zero_point, low, high))
    return laid_like(y, a, b)


def _qmul_fixed(
    a: Tensor, b: Tensor, z_a: int, z_b: int, multiplier: int, shift: int, zero_point: int, low: int, high: int,
    rounding: str = "single",
) -> Tensor:  # fmt: skip
    expect_dtype("qmul_fixed", "a", a, torch.uint8)
    expect_dtype("qmul_fixed", "b", b, torch.uint8)
    expect_fixed("qmul_fixed", rounding, multiplier, shift, shift)
    operands = a.numpy(), b.numpy(), z_a, z_b, multiplier, shift, zero_point, low, high, rounding
    return laid_like(_tensor(numerics.qmul_fixed(*operands)), a, b)


qlinear_fixed = kernels.define(
    "qlinear_fixed(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, Tensor shift, int zero_point, int low, "
    'int high, str rounding="single", Tensor? zero_w=None) -> Tensor',
    _qlinear_fixed,
    lambda x, weight, bias, *rest: x.new_empty(*x.shape[:-1], bias.shape[0]),
)
requantize_fixed = kernels.define(
    "requantize_fixed(Tensor q, int z_x, int multiplier, int shift, int zero_point, int low, int high, "
    'str rounding="single") -> Tensor',
    _requantize_fixed,
    lambda q, *rest: laid_like(q.new_empty(q.shape), q),
)
qadd_fixed = kernels.define(
    "qadd_fixed(Tensor a, Tensor b, int m_a, int z_a, int m_b, int z_b, int shift, int zero_point, int low, int high) "
    "-> Tensor",
    _qadd_fixed,
    lambda a, b, *rest: empty_pair(a, b),
)
qmul_fixed = kernels.define(
    "qmul_fixed(Tensor a, Tensor b, int z_a, int z_b, int multiplier, int shift, int zero_point, int low, int high, "
    'str rounding="single") -> Tensor',
    _qmul_fixed,
    lambda a, b, *rest: empty_pair(a, b),
)

"""What the convolutions of a golden model compute, and what moves images, in NumPy: functions for rows of `golden_ops`.

Operands come in the order of the torch ops, whose weights are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxq import numerics
from fxq.numerics import F32, I8, I32, U8, Array

Ints = Sequence[int]


def _conv(x: U8, weight: I8, bias: I32, window: str, z_x: int) -> tuple[I8, numerics.Conv]:
    """The weight [N, C / groups, *kernel], and how it goes over the input."""
    own = numerics.Window.parse(window)
    n, channels = len(bias), x.shape[1] // own.groups
    geometry = n, channels, own.kernel, own.dilation, own.groups
    if weight.shape != (numerics.packed_conv_size(*geometry),):
        raise ValueError(f"its input has {x.shape[1]} channels, which is not what its weight takes")
    conv = numerics.Conv(own.stride, own.padding, own.dilation, own.groups, z_x)
    return numerics.unpack_conv(weight, *geometry), conv


def qconv(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    """`numerics.qconv`."""
    w, conv = _conv(x, weight, bias, window, z_x)
    return numerics.qconv(x, w, bias, multiplier, conv, zero_point, low, high)


def qconv_fixed(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    window: str,
    z_x: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """`numerics.qconv_fixed`."""
    w, conv = _conv(x, weight, bias, window, z_x)
    return numerics.qconv_fixed(x, w, bias, multiplier, shift, conv, zero_point, low, high, rounding)


def qconv_float(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    addend: F32 | None = None,
) -> F32:
    """`numerics.qconv_float`."""
    w, conv = _conv(x, weight, bias, window, z_x)
    return numerics.qconv_float(x, w, bias, multiplier, conv, addend)


def qconv_act_quantize(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    activation: str,
    scale: float,
    zero_point: int,
) -> U8:
    """`numerics.qconv_act_quantize`."""
    w, conv = _conv(x, weight, bias, window, z_x)
    return numerics.qconv_act_quantize(x, w, bias, multiplier, conv, activation, scale, zero_point)


def qconv_add(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    addend: U8,
    m_b: float,
    z_b: int,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    """`numerics.qconv_add`."""
    w, conv = _conv(x, weight, bias, window, z_x)
    return numerics.qconv_add(x, w, bias, multiplier, conv, addend, m_b, z_b, zero_point, low, high)


def conv_weight(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: Array,
    window: str,
    z_x: int,
    *rest: object,
    **named: object,
) -> I8:
    """The weight [N, C / groups, *kernel]."""
    return _conv(x, weight, bias, window, z_x)[0]


def conv_fixed_weight(x: U8, weight: I8, bias: I32, multiplier: I32, shift: I32, *rest: Any) -> I8:
    """`conv_weight` of `qconv_fixed`."""
    return conv_weight(x, weight, bias, multiplier, *rest)


def conv_fixed_parts(x: U8, weight: I8, bias: I32, multiplier: I32, shift: I32, *rest: Any) -> dict[str, Array]:
    """`conv_parts` of `qconv_fixed`."""
    return conv_parts(x, weight, bias, multiplier, *rest)


def conv_parts(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: Array,
    window: str,
    z_x: int,
    *rest: object,
    **named: object,
) -> dict[str, Array]:
    """What lies inside a convolution: its input, the integer sums, and those with the folded bias."""
    w, conv = _conv(x, weight, bias, window, z_x)
    acc = conv.accumulate(x, w)
    return {"x_q": x, "acc": acc, "acc+bias": acc + bias.reshape(-1, *[1] * (x.ndim - 2))}


def _transposed(x: U8, weight: I8, multiplier: Array, window: str, z_x: int) -> tuple[I8, numerics.ConvTranspose]:
    own = numerics.Window.parse(window)
    n, channels = len(multiplier), x.shape[1] // own.groups
    geometry = n, channels, own.kernel, own.stride, own.padding, own.dilation, own.groups
    if weight.shape != (numerics.packed_transposed_size(*geometry),):
        raise ValueError(f"its input has {x.shape[1]} channels, which is not what its weight takes")
    conv = numerics.ConvTranspose(own.stride, own.padding, own.output_padding, own.dilation, own.groups, z_x)
    return numerics.unpack_transposed(weight, *geometry), conv


def qconv_transpose(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    zero_point: int,
    low: int,
    high: int,
) -> U8:
    """`numerics.qconv_transpose`."""
    w, conv = _transposed(x, weight, multiplier, window, z_x)
    return numerics.qconv_transpose(x, w, bias, multiplier, conv, zero_point, low, high)


def qconv_transpose_fixed(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    window: str,
    z_x: int,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
) -> U8:
    """`numerics.qconv_transpose_fixed`."""
    w, conv = _transposed(x, weight, multiplier, window, z_x)
    return numerics.qconv_transpose_fixed(x, w, bias, multiplier, shift, conv, zero_point, low, high, rounding)


def qconv_transpose_float(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    window: str,
    z_x: int,
    addend: F32 | None = None,
) -> F32:
    """`numerics.qconv_transpose_float`."""
    w, conv = _transposed(x, weight, multiplier, window, z_x)
    return numerics.qconv_transpose_float(x, w, bias, multiplier, conv, addend)


def conv_transpose_weight(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: Array,
    window: str,
    z_x: int,
    *rest: object,
    **named: object,
) -> I8:
    """The weight [N, C / groups, *kernel]."""
    return _transposed(x, weight, multiplier, window, z_x)[0]


def conv_transpose_fixed_weight(x: U8, weight: I8, bias: I32, multiplier: I32, shift: I32, *rest: Any) -> I8:
    """`conv_transpose_weight` of `qconv_transpose_fixed`."""
    return conv_transpose_weight(x, weight, bias, multiplier, *rest)


def conv_transpose_parts(
    x: U8, weight: I8, bias: I32, multiplier: Array, window: str, z_x: int, *rest: object, **named: object
) -> dict[str, Array]:
    """What lies inside a transposed convolution: its input, and the integer sums with each phase's bias."""
    w, conv = _transposed(x, weight, multiplier, window, z_x)
    return {"x_q": x, "acc+bias": conv.sums(x, w, bias)}


def conv_transpose_fixed_parts(
    x: U8, weight: I8, bias: I32, multiplier: I32, shift: I32, *rest: Any
) -> dict[str, Array]:
    """`conv_transpose_parts` of `qconv_transpose_fixed`."""
    return conv_transpose_parts(x, weight, bias, multiplier, *rest)


_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pad(input: Array, pad: Ints, mode: str = "constant", value: Any = None) -> Array:
    """torch's pad: `pad` holds two numbers per dimension, the last dimension first; a negative one cuts off."""
    widths = [(0, 0)] * input.ndim
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        axis = input.ndim - 1 - i
        size = input.shape[axis]
        input = np.take(input, range(max(-before, 0), size - max(-after, 0)), axis)
        widths[axis] = (max(before, 0), max(after, 0))
    if mode == "constant":
        return np.pad(input, widths, constant_values=value or 0)
    options: Any = {"mode": _MODES[mode]}
    return np.pad(input, widths, **options)


def channel_shuffle(input: Array, groups: int) -> Array:
    """Channel g * C / groups + i goes to i * groups + g."""
    split = input.reshape(input.shape[0], groups, input.shape[1] // groups, *input.shape[2:])
    return np.swapaxes(split, 1, 2).reshape(input.shape)

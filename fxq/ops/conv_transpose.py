"""conv_transpose: an upsampling convolution, as the ordinary ones that it consists of, one per phase of the stride.

    acc[b, n, *o] = sum_{c, t: o = i * stride - padding + t * dilation} q_x[b, c, *i] * q_w[n, c, *t]     exact int32
    qconv_transpose        q_y = clamp(rne(f32(acc + bias_i32[phase]) * f32(s_x * s_w[n] / s_y)) + z_y, low, high) -> uint8
    qconv_transpose_fixed  q_y = clamp(scale(acc + bias_i32[phase], multiplier[n], shift[n]) + z_y, low, high)         -> uint8
    qconv_transpose_float  y   = f32(acc + bias_i32[phase]) * f32(s_x * s_w[n]) [+ addend]                       -> float32

x: uint8 [B, C, *spatial]; weight: int8, packed (`numerics.pack_transposed`); bias: int32 [phases, N]
(`numerics.fold_transposed_bias`): the outputs o with one o mod stride, a phase, all see the same taps, and only those
are folded; multiplier: float32 [N], fixed int32 [N] beside shift, with scale as in `fxq.ops.fixed_point`; window:
`numerics.Window` as text. Results are channels-last in memory.
NumPy truth: the functions of the same names in `fxq.numerics`.
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics, product
from fxq.clamps import clamp_of, clamped, fuse_clamp
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import constant
from fxq.layout import channels_last, empty
from fxq.pattern import Any as Operand
from fxq.pattern import Const, Match, Miss, OneOf, Op
from fxq.qdq import (
    dequantize,
    dequantize_weight,
    expect_dtype,
    expect_fixed_channels,
    quantize,
    round_clamp,
    scale_clamp,
)
from fxq.spelling import CONV_TRANSPOSE


def _sums(op: str, x: Tensor, weight: Tensor, bias: Tensor, n: int, window: str, z_x: int) -> Tensor:
    """acc + bias[phase], exact in float64."""
    expect_dtype(op, "x", x, torch.uint8)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "bias", bias, torch.int32)
    own = numerics.Window.parse(window)
    kernel, stride, padding, dilation, groups = own.kernel, own.stride, own.padding, own.dilation, own.groups
    rank = len(kernel)
    if x.dim() != rank + 2 or x.shape[1] % groups or n % groups:
        raise ValueError(f"fxq::{op}: x {list(x.shape)}, window {window!r}, groups {groups}, N {n}")
    if bias.shape != (math.prod(stride), n):
        raise ValueError(f"fxq::{op}: bias has shape {list(bias.shape)}, expected {[math.prod(stride), n]}")
    geometry = (n, x.shape[1] // groups, kernel, stride, padding, dilation, groups)
    size = numerics.packed_transposed_size(*geometry)
    if weight.dim() != 1 or weight.numel() != size:
        raise ValueError(f"fxq::{op}: a packed weight of shape {list(weight.shape)}, expected [{size}]")
    q_w = numerics.unpack_transposed(weight.numpy(), *geometry)
    y = torch.zeros(x.shape[0], n, *_sizes(x, own), dtype=torch.float64)
    ones = [1] * rank
    column = (-1, *ones)
    parts = numerics.phases(x.shape[2:], kernel, stride, padding, own.output_padding, dilation)
    for phase, biases in zip(parts, bias, strict=True):
        if not all(phase.sizes):
            continue
        acc = torch.zeros(x.shape[0], n, *phase.sizes, dtype=torch.float64)
        if all(phase.taps):
            w = torch.from_numpy(phase.select(q_w)).to(torch.float64)
            widths = [edge for i in reversed(range(rank)) for edge in phase.padding[2 * i : 2 * i + 2]]
            padded = F.pad(x.to(torch.float64), widths, value=float(z_x))
            acc = (F.conv1d, F.conv2d, F.conv3d)[rank - 1](padded, w, None, ones, 0, phase.dilation, groups)
        where: list[Any] = [slice(first, None, s) for first, s in zip(phase.first, stride, strict=True)]
        y[(..., *where)] = acc + biases.view(column)
    return y


def _accumulate(op: str, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, window: str, z_x: int) -> Tensor:
    """f32(acc + bias[phase]) * multiplier."""
    expect_dtype(op, "multiplier", multiplier, torch.float32)
    sums = _sums(op, x, weight, bias, multiplier.shape[0], window, z_x)
    return channels_last(sums.to(torch.float32) * multiplier.view(-1, *[1] * (x.dim() - 2)))


def _sizes(x: Tensor, own: numerics.Window) -> list[int]:
    geometry = own.kernel, own.stride, own.padding, own.output_padding, own.dilation
    return numerics.transposed_sizes(x.shape[2:], *geometry)


def _qconv_transpose(*args: Any) -> Tensor:
    *operands, zero_point, low, high = args
    return round_clamp(_accumulate("qconv_transpose", *operands), zero_point, low, high)


def _qconv_transpose_fixed(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, shift: Tensor, window: str, z_x: int,
    zero_point: int, low: int, high: int, rounding: str = "single",
) -> Tensor:  # fmt: skip
    op, n = "qconv_transpose_fixed", multiplier.numel()
    expect_fixed_channels(op, rounding, n, multiplier=multiplier, shift=shift)
    return scale_clamp(_sums(op, x, weight, bias, n, window, z_x), multiplier, shift, zero_point, low, high, rounding)


def _qconv_transpose_float(*args: Any) -> Tensor:
    addend = args[6] if len(args) > 6 else None  # the dispatcher drops what equals its default
    y = _accumulate("qconv_transpose_float", *args[:6])
    if addend is None:
        return y
    added: Tensor = addend.view(-1, *[1] * (y.dim() - 2)) if addend.dim() == 1 else addend
    return y + added


def _define(name: str, portable: Any, epilogue: str, dtype: torch.dtype, fixed: bool = False) -> torch._ops.OpOverload:
    def fake(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, *rest: Any) -> Tensor:
        return empty(x, multiplier.shape[0], _sizes(x, numerics.Window.parse(rest[int(fixed)])), dtype)

    operands = "Tensor x, Tensor weight, Tensor bias, Tensor multiplier" + ", Tensor shift" * fixed
    return kernels.define(f"{name}({operands}, str window, int z_x, {epilogue}) -> Tensor", portable, fake)


qconv_transpose = _define("qconv_transpose", _qconv_transpose, "int zero_point, int low, int high", torch.uint8)
qconv_transpose_fixed = _define(
    "qconv_transpose_fixed",
    _qconv_transpose_fixed,
    'int zero_point, int low, int high, str rounding="single"',
    torch.uint8,
    fixed=True,
)
qconv_transpose_float = _define("qconv_transpose_float", _qconv_transpose_float, "Tensor? addend=None", torch.float32)


def conv_transpose_clamp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
    low: float | None,
    high: float | None,
) -> Tensor:
    """clamp(conv_transpose(...), low, high) in float: one that has swallowed the clamp behind it."""
    return clamped(CONV_TRANSPOSE(x, weight, bias, stride, padding, output_padding, groups, dilation), low, high)


_SETTINGS = tuple(map(Operand, ("stride", "padding", "output_padding", "groups", "dilation")))
_OPERANDS = (
    Op({dequantize}, Operand("x"), Operand("s_x"), Operand("z_x"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Operand("bias"),
    *_SETTINGS,
)
_CONV = Op({CONV_TRANSPOSE}, *_OPERANDS, name="conv")
_CLAMPED = Op({conv_transpose_clamp}, *_OPERANDS, Operand("low"), Operand("high"), name="conv")
_LOWERED = OneOf(Op({quantize}, OneOf(_CONV, _CLAMPED), Operand("s_y"), Operand("z_y")), _CONV)
_CLAMP = clamp_of(Op({CONV_TRANSPOSE}, Operand("x"), Operand("w"), Operand("bias"), *_SETTINGS))
_OF_TORCH = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})


@dataclass(frozen=True)
class ConvTranspose(Family):
    """A transposed convolution with a constant float32 weight."""

    name: str = "conv_transpose"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Raises `CalibrationError` for a weight that is not finite."""
        if node.op != "call_function" or node.target not in _OF_TORCH | {CONV_TRANSPOSE}:
            return None
        if node.target in _OF_TORCH:
            return Refusal(Reason.DYNAMIC_WEIGHT, "weight is computed")
        settings = [value for i in (3, 4, 5, 7) for value in node.args[i]]  # type: ignore[union-attr]
        if not all(isinstance(value, int) for value in (*settings, node.args[6])):
            return Refusal(Reason.NO_INTEGER_OP, "its stride, padding, dilation or groups are computed at run time")
        return product.claim(gm, node)

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """relu(conv_transpose(...)) -> conv_transpose_clamp(..., 0, None), where nobody else reads."""
        return fuse_clamp(gm, clamp, _CLAMP, conv_transpose_clamp)

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(conv_transpose[_clamp](...)) -> qconv_transpose; without quantize -> qconv_transpose_float."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        _lower(gm, match, notes)
        return True


def _lower(gm: GraphModule, match: Match, notes: list[str]) -> None:
    conv = match.node("conv")
    kernel, stride, dilation, groups = (
        tuple(constant(gm, match.node("w")).shape[2:]),
        match["stride"],
        match["dilation"],
        match["groups"],
    )
    padding = tuple(edge for size in match["padding"] for edge in (size, size))

    def fold(bias: numerics.F32 | None, w: numerics.I8, s_x: float, z_x: int, s_w: numerics.F32) -> Any:
        return numerics.fold_transposed_bias(bias, w, s_x, z_x, s_w, stride, padding, dilation)

    def pack(w: numerics.I8) -> numerics.I8:
        return numerics.pack_transposed(w, stride, padding, dilation, groups)

    constants = product.derive(gm, match, conv, match.root, fold, pack, notes)
    window = numerics.Window(kernel, stride, padding, dilation, groups, match["output_padding"])
    operands = (match.node("x"), *constants.operands, str(window), match["z_x"])
    floating = qconv_transpose_float, (*operands, constants.addend)
    product.write(gm, match, conv, constants, (qconv_transpose, operands), floating)


FAMILY = ConvTranspose()

"""conv: y = x * w + b over windows, in one to three spatial dimensions; with a residual or an activation behind it.

    acc[b, n, *o] = sum_{c, t} q_x[b, c, *(o * stride - padding + t * dilation)] * q_w[n, c, *t]       exact int32
    qconv               q_y = clamp(rne(f32(acc + bias_i32) * f32(s_x * s_w[n] / s_y)) + z_y, low, high)       -> uint8
    qconv_fixed         q_y = clamp(scale(acc + bias_i32, multiplier[n], shift[n]) + z_y, low, high)           -> uint8
    qconv_float         y   = f32(acc + bias_i32) * f32(s_x * s_w[n]) [+ addend]                             -> float32
    qconv_act_quantize  q_y = quantize(act(f32(acc + bias_i32) * f32(s_x * s_w[n])), s_y, z_y)                 -> uint8
    qconv_add           q_y = clamp(rne(f32(acc + bias_i32) * m + f32((q_b - z_b) * m_b)) + z_y, low, high)    -> uint8

x: uint8 [B, C, *spatial]; weight: int8, packed (`numerics.pack_conv`); bias: int32 [N] (`numerics.fold_bias` over the
whole kernel); multiplier: float32 [N]; window: how windows lie on x, as text (`numerics.Window`); what they see outside
of x is z_x; addend: float32 [N] or of the shape of the result; scale, whose multiplier and shift are int32 [N]:
`fxq.ops.fixed_point`. kernel * C / groups <= 66311. Results are channels-last in memory, x is best so too
(`fxq.layout`). NumPy truth: the functions of the same names in `fxq.numerics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    steps_from,
)
from fxq.spelling import CONVS, PAD

Ints = Sequence[int]


def _accumulate(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    window: str,
    z_x: int,
) -> Tensor:
    """f32(acc + bias) * multiplier, channels-last."""
    expect_dtype(op, "multiplier", multiplier, torch.float32)
    if multiplier.shape != bias.shape:
        raise ValueError(f"fxq::{op}: multiplier has shape {list(multiplier.shape)}, bias {list(bias.shape)}")
    sums = _sums(op, x, weight, bias, window, z_x)
    return sums.to(torch.float32) * multiplier.view(-1, *[1] * (x.dim() - 2))


def _sums(op: str, x: Tensor, weight: Tensor, bias: Tensor, window: str, z_x: int) -> Tensor:
    """acc + bias, int64, channels-last; summed in float64, which holds every sum."""
    expect_dtype(op, "x", x, torch.uint8)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "bias", bias, torch.int32)
    own = numerics.Window.parse(window)
    kernel, padding, dilation, groups = own.kernel, own.padding, own.dilation, own.groups
    n, rank = bias.shape[0], len(kernel)
    if x.dim() != rank + 2 or x.shape[1] % groups or n % groups:
        raise ValueError(f"fxq::{op}: x {list(x.shape)}, window {window!r}, groups {groups}, N {n}")
    channels = x.shape[1] // groups
    size = numerics.packed_conv_size(n, channels, kernel, dilation, groups)
    if weight.dim() != 1 or weight.numel() != size:
        raise ValueError(f"fxq::{op}: a packed weight of shape {list(weight.shape)}, expected [{size}]")
    w = torch.from_numpy(numerics.unpack_conv(weight.numpy(), n, channels, kernel, dilation, groups))
    widths = [edge for i in reversed(range(rank)) for edge in padding[2 * i : 2 * i + 2]]
    padded = F.pad(x.to(torch.float64), widths, value=float(z_x))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    acc = convolve(padded, w.to(torch.float64), None, own.stride, 0, dilation, groups)
    return channels_last((acc + bias.view(-1, *[1] * rank)).to(torch.int64))


def _qconv(*args: Any) -> Tensor:
    *operands, zero_point, low, high = args
    return round_clamp(_accumulate("qconv", *operands), zero_point, low, high)


def _qconv_fixed(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, shift: Tensor, window: str, z_x: int,
    zero_point: int, low: int, high: int, rounding: str = "single",
) -> Tensor:  # fmt: skip
    op, n = "qconv_fixed", bias.numel()
    expect_fixed_channels(op, rounding, n, multiplier=multiplier, shift=shift)
    return scale_clamp(_sums(op, x, weight, bias, window, z_x), multiplier, shift, zero_point, low, high, rounding)


def _qconv_float(*args: Any) -> Tensor:
    addend = args[6] if len(args) > 6 else None  # the dispatcher drops what equals its default
    y = _accumulate("qconv_float", *args[:6])
    if addend is None:
        return y
    added: Tensor = addend.view(-1, *[1] * (y.dim() - 2)) if addend.dim() == 1 else addend
    return y + added


def _qconv_act_quantize(*args: Any) -> Tensor:
    *operands, activation, scale, zero_point = args
    if activation not in numerics.ACTIVATIONS:
        raise ValueError(f"fxq: unknown activation {activation!r}; there are {', '.join(numerics.ACTIVATIONS)}")
    y = _accumulate("qconv_act_quantize", *operands)
    activated = torch.from_numpy(np.asarray(numerics.ACTIVATIONS[activation](y.numpy())))
    return channels_last(kernels.portable("quantize")(activated, scale, zero_point))


def _qconv_add(*args: Any) -> Tensor:
    *operands, addend, m_b, z_b, zero_point, low, high = args
    y = _accumulate("qconv_add", *operands)
    expect_dtype("qconv_add", "addend", addend, torch.uint8)
    if addend.shape != y.shape:
        raise ValueError(f"fxq::qconv_add: addend has shape {list(addend.shape)}, the result {list(y.shape)}")
    return channels_last(round_clamp(y + steps_from(addend, z_b, m_b), zero_point, low, high))


def _define(name: str, portable: Any, epilogue: str, dtype: torch.dtype, fixed: bool = False) -> torch._ops.OpOverload:
    tensors = 5 if fixed else 4

    def fake(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        own = numerics.Window.parse(rest[tensors - 3])
        sizes = numerics.conv_sizes(x.shape[2:], own.kernel, own.stride, own.padding, own.dilation)
        return empty(x, bias.shape[0], sizes, dtype)

    operands = "Tensor x, Tensor weight, Tensor bias, Tensor multiplier" + ", Tensor shift" * fixed
    return kernels.define(f"{name}({operands}, str window, int z_x, {epilogue}) -> Tensor", portable, fake)


qconv = _define("qconv", _qconv, "int zero_point, int low, int high", torch.uint8)
qconv_fixed = _define(
    "qconv_fixed",
    _qconv_fixed,
    'int zero_point, int low, int high, str rounding="single"',
    torch.uint8,
    fixed=True,
)
qconv_float = _define("qconv_float", _qconv_float, "Tensor? addend=None", torch.float32)
qconv_act_quantize = _define(
    "qconv_act_quantize", _qconv_act_quantize, "str activation, float scale, int zero_point", torch.uint8
)
qconv_add = _define(
    "qconv_add", _qconv_add, "Tensor addend, float m_b, int z_b, int zero_point, int low, int high", torch.uint8
)


def conv_clamp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    low: float | None,
    high: float | None,
) -> Tensor:
    """clamp(conv(...), low, high) in float: a convolution that has swallowed the clamp behind it."""
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
    return clamped(convolve(x, weight, bias, stride, padding, dilation, groups), low, high)


CLAMPED = "clamped"
"""In the `meta` of a qconv: whether it has a clamp of its own, which its bounds do not always tell from the range."""

_SETTINGS = tuple(map(Operand, ("stride", "padding", "dilation", "groups")))
_OPERANDS = (
    Op({dequantize}, Operand("x"), Operand("s_x"), Operand("z_x"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Operand("bias"),
    *_SETTINGS,
)
_CONV = Op(CONVS, *_OPERANDS, name="conv")
_CLAMPED = Op({conv_clamp}, *_OPERANDS, Operand("low"), Operand("high"), name="conv")
_LOWERED = OneOf(Op({quantize}, OneOf(_CONV, _CLAMPED), Operand("s_y"), Operand("z_y")), _CONV)
_CLAMP = clamp_of(Op(CONVS, Operand("x"), Operand("w"), Operand("bias"), *_SETTINGS))


@dataclass(frozen=True)
class Conv(Family):
    """A convolution with a constant float32 weight."""

    name: str = "conv"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Raises `CalibrationError` for a weight that is not finite."""
        if node.op != "call_function" or node.target not in CONVS:
            return None
        settings = [value for setting in node.args[3:6] for value in setting]  # type: ignore[union-attr]
        if not all(isinstance(value, int) for value in (*settings, node.args[6])):
            return Refusal(Reason.NO_INTEGER_OP, "its stride, padding, dilation or groups are computed at run time")
        return product.claim(gm, node)

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """relu(conv(...)) -> conv_clamp(..., 0, None), and clamp likewise, where nobody else reads."""
        return fuse_clamp(gm, clamp, _CLAMP, conv_clamp)

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(conv[_clamp](dequantize, dequantize_weight, b, ...)) -> qconv; without quantize -> qconv_float."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        _lower(gm, match, notes)
        return True


def _lower(gm: GraphModule, match: Match, notes: list[str]) -> None:
    conv = match.node("conv")
    kernel, dilation, groups = tuple(constant(gm, match.node("w")).shape[2:]), match["dilation"], match["groups"]

    def fold(bias: numerics.F32 | None, w: numerics.I8, s_x: float, z_x: int, s_w: numerics.F32) -> Any:
        return numerics.fold_bias(bias, w.reshape(len(w), -1), s_x, z_x, s_w)

    def pack(w: numerics.I8) -> numerics.I8:
        return numerics.pack_conv(w, dilation, groups)

    constants = product.derive(gm, match, conv, match.root, fold, pack, notes)
    x, padding = _padded(match)
    window = str(numerics.Window(kernel, match["stride"], padding, dilation, groups))
    operands = (x, *constants.operands, window, match["z_x"])
    floating = qconv_float, (*operands, constants.addend)
    lowered = product.write(gm, match, conv, constants, (qconv, operands), floating)
    if constants.to_uint8:
        lowered.meta[CLAMPED] = conv.target is conv_clamp


def _padded(match: Match) -> tuple[Node, tuple[int, ...]]:
    """The input and the padding of each side; a `pad` with the zero point before the convolution is a part of it."""
    x, both = match.node("x"), match["padding"]
    padding = [edge for size in both for edge in (size, size)]
    if x.target is PAD and x.args[2:] == ("constant", match["z_x"]):
        pads = x.args[1]
        assert isinstance(pads, tuple)
        widths = [pads[2 * i : 2 * i + 2] for i in reversed(range(len(pads) // 2))]  # first dimension first
        edges = [edge for pair in widths for edge in pair]
        if len(edges) <= len(padding) and all(isinstance(edge, int) and edge >= 0 for edge in edges):
            source = x.args[0]
            assert isinstance(source, Node)
            padding[len(padding) - len(edges) :] = [
                a + b for a, b in zip(padding[len(padding) - len(edges) :], edges, strict=True)
            ]
            return source, tuple(padding)
    return x, tuple(padding)


FAMILY = Conv()

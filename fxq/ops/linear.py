"""linear: y = x w^T + b, the product that int8 is for.

    acc[m, n] = sum_k q_x[m, k] * q_w[n, k]                                                 exact int32
    bias_i32[n] = rne(b[n] / (s_x * s_w[n])) - z_x * sum_k q_w[n, k]                        folded ahead of time
    qlinear        q_y = clamp(rne(f32(acc + bias_i32) * f32(s_x * s_w[n] / s_y)) + z_y, low, high)         -> uint8
    qlinear_float  y   = f32(acc + bias_i32) * f32(s_x * s_w[n]) [+ addend]                               -> float32

q_x: uint8 [..., K]; weight: int8, packed (`fxq.numerics.pack`); bias: int32 [N]; multiplier: float32 [N];
addend: float32, broadcast with y over all dimensions but N. K <= 66311, so that acc cannot leave int32. A relu is
low = z_y, at no cost.
NumPy truth: `fxq.numerics.qlinear`, `qlinear_float`. The bias is derived (scale s_x * s_w[n]), never calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics, product
from fxq.clamps import clamp_of, clamped, fuse_clamp
from fxq.family import Claim, Family, Refusal
from fxq.packing import unpack
from fxq.pattern import Any, Const, Miss, OneOf, Op
from fxq.qdq import dequantize, dequantize_weight, expect_dtype, quantize, round_clamp
from fxq.qtypes import Scheme
from fxq.spelling import LINEAR


def _accumulate(op: str, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
    """f32(acc + bias) * multiplier, in float64 up to the one rounding to float32."""
    expect_dtype(op, "x", x, torch.uint8)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "bias", bias, torch.int32)
    expect_dtype(op, "multiplier", multiplier, torch.float32)
    if multiplier.shape != bias.shape:
        raise ValueError(f"fxq::{op}: multiplier has shape {list(multiplier.shape)}, bias {list(bias.shape)}")
    w = unpack(weight, bias.shape[0], x.shape[-1])
    acc = torch.matmul(x.to(torch.float64), w.to(torch.float64).t()) + bias
    return acc.to(torch.float32) * multiplier


def _qlinear(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, zero_point: int, low: int, high: int
) -> Tensor:
    return round_clamp(_accumulate("qlinear", x, weight, bias, multiplier), zero_point, low, high)


def _qlinear_float(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, addend: Tensor | None = None) -> Tensor:
    y = _accumulate("qlinear_float", x, weight, bias, multiplier)
    if addend is None:
        return y
    expect_dtype("qlinear_float", "addend", addend, torch.float32)
    if addend.dim() and addend.shape[-1] not in (1, y.shape[-1]):
        raise ValueError(f"fxq::qlinear_float: addend has shape {list(addend.shape)}, the product {list(y.shape)}")
    return (y + addend).contiguous()


def _float_shape(x: Tensor, bias: Tensor, addend: Tensor | None) -> torch.Size:
    shape = torch.Size([*x.shape[:-1], bias.shape[0]])
    return shape if addend is None else torch.broadcast_shapes(shape, addend.shape)  # type: ignore[no-untyped-call]


qlinear = kernels.define(
    "qlinear(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int zero_point, int low, int high) -> Tensor",
    _qlinear,
    lambda x, weight, bias, multiplier, zero_point, low, high: x.new_empty(*x.shape[:-1], bias.shape[0]),
)
qlinear_float = kernels.define(
    "qlinear_float(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, Tensor? addend=None) -> Tensor",
    _qlinear_float,
    lambda x, weight, bias, multiplier, addend=None: x.new_empty(_float_shape(x, bias, addend), dtype=torch.float32),
)


def linear_clamp(x: Tensor, weight: Tensor, bias: Tensor | None, low: float | None, high: float | None) -> Tensor:
    """clamp(linear(x, weight, bias), low, high) in float: a linear that has swallowed the clamp behind it."""
    return clamped(F.linear(x, weight, bias), low, high)


_OPERANDS = (
    Op({dequantize}, Any("x"), Any("s_x"), Any("z_x"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Any("bias"),
)
_LINEAR = Op({LINEAR}, *_OPERANDS, name="linear")
_CLAMPED = Op({linear_clamp}, *_OPERANDS, Any("low"), Any("high"), name="linear")
_LOWERED = OneOf(Op({quantize}, OneOf(_LINEAR, _CLAMPED), Any("s_y"), Any("z_y")), _LINEAR)
_CLAMP = clamp_of(Op({LINEAR}, _OPERANDS[0], Any("w"), Any("bias")))

_SCHEMES: dict[torch.dtype, tuple[Scheme, ...]] = {
    torch.float32: ("w8a8", "w8a8-dynamic", "w8a32"),
    torch.bfloat16: ("w8a16",),
    torch.float16: ("w8a16",),
}


@dataclass(frozen=True)
class Linear(Family):
    """A linear with a constant weight, in every scheme; those without integers between layers have ops of their own."""

    name: str = "linear"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Raises `CalibrationError` for a weight that is not finite."""
        if node.op != "call_function" or node.target is not LINEAR:
            return None
        return product.claim(gm, node, _SCHEMES)

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """relu(linear(x, w, b)) -> linear_clamp(x, w, b, 0, None), and clamp likewise, where nobody else reads.

        Of a linear that reads integers: those that read float32 have other epilogues.
        """
        return fuse_clamp(gm, clamp, _CLAMP, linear_clamp)

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(linear[_clamp](dequantize, dequantize_weight, b)) -> qlinear; without quantize -> qlinear_float."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        linear = match.node("linear")
        constants = product.derive(gm, match, linear, match.root, numerics.fold_bias, numerics.pack, notes)
        operands = (match.node("x"), *constants.operands)
        floating = operands if constants.addend is None else (*operands, constants.addend)
        product.write(gm, match, linear, constants, (qlinear, operands), (qlinear_float, floating))
        return True


FAMILY = Linear()

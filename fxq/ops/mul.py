"""mul: y = a * b of two tensors, in integers (a gate, as in squeeze-and-excite).

    q_y = clamp(rne(f32((q_a - z_a) * (q_b - z_b) * m)) + z_y, low, high),  m = f32(s_a * s_b / s_y)

q_a, q_b: uint8, broadcastable; the product of the integers is exact, so there is one rounding before the last. NumPy
truth: `fxq.numerics.qmul`. A relu behind it is low = z_y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.clamps import clamp_of
from fxq.decisions import Reason
from fxq.elementwise import is_bounded
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, is_tensor, replace
from fxq.layout import empty_pair, laid_like
from fxq.numerics import f32
from fxq.pattern import Any, Miss, OneOf, Op
from fxq.qdq import dequantize, expect_dtype, integer_bounds, quantize, round_clamp
from fxq.spelling import MUL, float_bounds


def _qmul(a: Tensor, b: Tensor, m: float, z_a: int, z_b: int, zero_point: int, low: int, high: int) -> Tensor:
    expect_dtype("qmul", "a", a, torch.uint8)
    expect_dtype("qmul", "b", b, torch.uint8)
    product = (a.to(torch.int32) - z_a) * (b.to(torch.int32) - z_b)
    steps = product.to(torch.float32) * torch.tensor(m, dtype=torch.float32)
    return laid_like(round_clamp(steps, zero_point, low, high), a, b)


qmul = kernels.define(
    "qmul(Tensor a, Tensor b, float m, int z_a, int z_b, int zero_point, int low, int high) -> Tensor",
    _qmul,
    lambda a, b, *rest: empty_pair(a, b),
)

_MUL = Op(
    {MUL},
    Op({dequantize}, Any("a"), Any("s_a"), Any("z_a"), shared=True),
    Op({dequantize}, Any("b"), Any("s_b"), Any("z_b"), shared=True),
)
_LOWERED = Op({quantize}, OneOf(_MUL, clamp_of(_MUL)), Any("s_y"), Any("z_y"))


@dataclass(frozen=True)
class Mul(Family):
    """The product of two float32 tensors, number by number."""

    name: str = "mul"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A product of two images, or of a tensor and a gate that broadcasts, both of which the network computes.

        Gated linear units of transformers stay float: their products have outliers, unless both operands are bounded
        (the tanh and sigmoid of a gate). Scalar and constant factors belong to `fxq.ops.lookup`.
        """
        if node.op != "call_function" or node.target is not MUL or not is_float_tensor(node):
            return None
        operands = [operand for operand in node.args if isinstance(operand, Node) and operand.op != "get_attr"]
        if len(operands) != 2 or not all(is_tensor(operand) for operand in operands):
            return Refusal(Reason.NO_INTEGER_OP, "mul by a scalar or constant")
        if not all(is_float_tensor(operand) for operand in operands):
            return Refusal(Reason.NOT_FLOAT32, "an operand is not float32")
        shapes = [operand.meta["value"].shape for operand in operands]
        bounded = all(is_bounded(gm, operand) for operand in operands)
        if shapes[0] == shapes[1] and len(shapes[0]) < 4 and not bounded:
            return Refusal(Reason.UNPROFITABLE, "a gate as large as its sequence has outliers")
        return Claim("pointwise", tuple(operands))

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize([clamp](mul(dequantize(a), dequantize(b)))) -> qmul."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        s_y, z_y = match["s_y"], match["z_y"]
        bounds = float_bounds(match.bound.get("clamp")) or (None, None)
        m = f32(match["s_a"] * match["s_b"] / s_y)
        args = (match["a"], match["b"], m, match["z_a"], match["z_b"], z_y)
        replace(gm, node, qmul, (*args, *integer_bounds(bounds, s_y, z_y)), (s_y, z_y))
        return True


FAMILY = Mul()

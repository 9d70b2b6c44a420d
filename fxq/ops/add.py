"""add: y = a + b of two tensors, in integers (a residual connection).

    q_y = clamp(rne(f32(f32((q_a - z_a) * m_a) + f32((q_b - z_b) * m_b))) + z_y, low, high)
    m_a = f32(s_a / s_y), m_b = f32(s_b / s_y)

q_a, q_b: uint8, broadcastable; three float roundings, no fused multiply-add. NumPy truth: `fxq.numerics.qadd`.
A relu behind it is low = z_y. Both operands are brought to the scale of the result, so no range is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.clamps import clamp_of, clamped, fuse_clamp
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, is_tensor, replace
from fxq.layout import empty_pair, laid_like
from fxq.numerics import f32
from fxq.pattern import Any, Miss, OneOf, Op
from fxq.qdq import dequantize, expect_dtype, integer_bounds, quantize, round_clamp, steps_from
from fxq.spelling import ADD


def _qadd(
    a: Tensor, b: Tensor, m_a: float, z_a: int, m_b: float, z_b: int, zero_point: int, low: int, high: int
) -> Tensor:
    expect_dtype("qadd", "a", a, torch.uint8)
    expect_dtype("qadd", "b", b, torch.uint8)
    y = round_clamp(steps_from(a, z_a, m_a) + steps_from(b, z_b, m_b), zero_point, low, high)
    return laid_like(y, a, b)


qadd = kernels.define(
    "qadd(Tensor a, Tensor b, float m_a, int z_a, float m_b, int z_b, int zero_point, int low, int high) -> Tensor",
    _qadd,
    lambda a, b, *rest: empty_pair(a, b),
)


def add_clamp(a: Tensor, b: Tensor, low: float | None, high: float | None) -> Tensor:
    """clamp(a + b, low, high) in float: an add that has swallowed the clamp behind it."""
    return clamped(torch.add(a, b), low, high)


_OPERANDS = (
    Op({dequantize}, Any("a"), Any("s_a"), Any("z_a"), shared=True),
    Op({dequantize}, Any("b"), Any("s_b"), Any("z_b"), shared=True),
)
_ADD = Op({ADD}, *_OPERANDS)
_LOWERED = Op({quantize}, OneOf(_ADD, Op({add_clamp}, *_OPERANDS, Any("low"), Any("high"))), Any("s_y"), Any("z_y"))
_CLAMP = clamp_of(_ADD)


@dataclass(frozen=True)
class Add(Family):
    """The sum of two float32 tensors."""

    name: str = "add"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """An add of two tensors that the network computes; a scalar or constant operand has no integer form yet."""
        if node.op != "call_function" or node.target is not ADD or not is_tensor(node):
            return None
        if len(node.args) != 2 or node.kwargs:
            return Refusal(Reason.NO_INTEGER_OP, "add with alpha")
        operands = [operand for operand in node.args if isinstance(operand, Node) and operand.op != "get_attr"]
        if not node.meta["value"].dtype.is_floating_point:
            return None
        if len(operands) != 2 or not all(is_tensor(operand) for operand in operands):
            return Refusal(Reason.NO_INTEGER_OP, "add of a scalar or constant")
        if not all(is_float_tensor(operand) for operand in operands):
            return Refusal(Reason.NOT_FLOAT32, "an operand is not float32")
        return Claim("pointwise", tuple(operands))

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """relu(add(a, b)) -> add_clamp(a, b, 0, None), and clamp likewise, where nobody else reads the sum."""
        return fuse_clamp(gm, clamp, _CLAMP, add_clamp)

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(add[_clamp](dequantize(a), dequantize(b))) -> qadd."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        s_y, z_y = match["s_y"], match["z_y"]
        low, high = integer_bounds((match.bound.get("low"), match.bound.get("high")), s_y, z_y)
        m_a, m_b = f32(match["s_a"] / s_y), f32(match["s_b"] / s_y)
        args = (match["a"], match["b"], m_a, match["z_a"], m_b, match["z_b"], z_y, low, high)
        replace(gm, node, qadd, args, (s_y, z_y))
        return True


FAMILY = Add()

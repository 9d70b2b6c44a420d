"""linear_weight_only: float activations and int8 weights, which are widened in registers; no float weight is ever made.

    y[m, n] = f32(f32(sum_k x[m, k] * q_w[n, k]) * scale[n]), then f32(y + bias[n]) where one is given

x: float32, bfloat16 or float16 [..., K], and y likewise [..., N]; weight: int8, packed; scale, bias: float32 [N];
dtype: of the activations that the model was quantized for, others being refused, or None where all three will do. The
sum is float32 in one fixed order, by fused multiply-adds, so that every instruction set and NumPy agree bit for bit;
16-bit activations are widened, which is exact, and the result is rounded once more. NumPy truth:
`numerics.linear_weight_only`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.family import Family
from fxq.graph import constant, get_attr, replace
from fxq.packing import packed_constant, shared_constant, sibling, unpack
from fxq.pattern import Any, Const, Miss, OneOf, Op
from fxq.qdq import dequantize_weight, expect_dtype
from fxq.spelling import LINEAR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the activations."""


def _expect_activations(x: Tensor, dtype: torch.dtype | None) -> None:
    if x.dtype not in (DTYPES if dtype is None else (dtype,)):
        expected = " or ".join(map(str, DTYPES if dtype is None else (dtype,)))
        raise TypeError(f"fxq::linear_weight_only: x has dtype {x.dtype}, expected {expected}")


def _linear_weight_only(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    op = "linear_weight_only"
    _expect_activations(x, dtype)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "scale", scale, torch.float32)
    if bias is not None:
        expect_dtype(op, "bias", bias, torch.float32)
        if bias.shape != scale.shape:
            raise ValueError(f"fxq::{op}: bias has shape {list(bias.shape)}, scale {list(scale.shape)}")
    w = unpack(weight, len(scale), x.shape[-1])
    arrays = (None if tensor is None else tensor.detach().numpy() for tensor in (x.float(), w, scale, bias))
    return torch.from_numpy(numerics.linear_weight_only(*arrays)).to(x.dtype)  # type: ignore[arg-type]


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    _expect_activations(x, dtype)
    return x.new_empty(*x.shape[:-1], len(scale))


linear_weight_only = kernels.define(
    "linear_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    _linear_weight_only,
    _fake,
)

_WEIGHT = OneOf(
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), Any("dtype"), shared=True),
)
_PATTERN = Op({LINEAR}, Any("x"), _WEIGHT, Any("bias"))


@dataclass(frozen=True)
class LinearWeightOnly(Family):
    """The form of a linear in the schemes "w8a32" and "w8a16"; it is the family `linear` that claims it."""

    name: str = "linear_weight_only"

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """linear(x, dequantize_weight(w, s_w), b) -> linear_weight_only(x, w, s_w, b, dtype of x)."""
        match = _PATTERN.match(node)
        if isinstance(match, Miss):
            return False
        path = str(match.node("w").target)
        w, s_w = (constant(gm, match.node(name)).numpy() for name in ("w", "s_w"))
        scale = torch.from_numpy(np.broadcast_to(s_w, len(w)).copy())
        with gm.graph.inserting_before(node):
            constants = [
                packed_constant(gm, path, w),
                shared_constant(gm, sibling(path, "weight_scale"), scale),
            ]
            operands = [match["x"], *(get_attr(gm, path, node) for path in constants)]
            bias = match["bias"]
            if bias is not None and constant(gm, bias).dtype != torch.float32:
                wide = shared_constant(gm, sibling(path, "bias_f32"), constant(gm, bias).detach().float())
                bias = get_attr(gm, wide, node)
        x = match.node("x")
        replace(gm, node, linear_weight_only, (*operands, bias, x.meta["value"].dtype))
        return True


FAMILY = LinearWeightOnly()

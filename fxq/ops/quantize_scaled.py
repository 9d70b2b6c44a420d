"""quantize_scaled: a factor per channel on the way into integers.

    q[..., k] = clamp(rne(f32(f32(x[..., k] * factor[k]) * f32(1 / scale))) + zero_point, 0, 255)

x: float32 [..., K]; factor: float32 [K]. What `quantize(x * factor)` computes, in one pass over x: channels of unequal
size then share one scale, and the weight behind them holds the inverse factors. NumPy truth:
`fxq.numerics.quantize_scaled`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.family import Family
from fxq.graph import constant, replace
from fxq.pattern import Any, Const, Match, Op
from fxq.qdq import expect_dtype, quantize
from fxq.spelling import MUL


def _quantize_scaled(x: Tensor, factor: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("quantize_scaled", "x", x, torch.float32)
    expect_dtype("quantize_scaled", "factor", factor, torch.float32)
    if factor.shape != x.shape[-1:]:
        raise ValueError(f"fxq::quantize_scaled: factor has shape {list(factor.shape)}, x {list(x.shape)}")
    q: Tensor = kernels.portable("quantize")(x * factor, scale, zero_point)
    return q


quantize_scaled = kernels.define(
    "quantize_scaled(Tensor x, Tensor factor, float scale, int zero_point) -> Tensor",
    _quantize_scaled,
    lambda x, factor, scale, zero_point: x.new_empty(x.shape, dtype=torch.uint8),
)

_PATTERN = Op({quantize}, Op({MUL}, Any("x"), Const("factor")), Any("scale"), Any("zero_point"))


@dataclass(frozen=True)
class QuantizeScaled(Family):
    """A quantize of a tensor times a constant per channel."""

    name: str = "quantize_scaled"

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(x * factor, s, z) -> quantize_scaled(x, factor, s, z)."""
        match = _PATTERN.match(node)
        if not isinstance(match, Match):
            return False
        x, factor = match["x"], constant(gm, match.node("factor"))
        if factor.dtype != torch.float32 or factor.shape != x.meta["value"].shape[-1:]:
            return False
        qparams = match["scale"], match["zero_point"]
        scaled = replace(gm, node, quantize_scaled, (x, match.node("factor"), *qparams), qparams)
        if "source" in x.meta:
            scaled.meta["source"] = x.meta["source"]  # whose value it stands for: the factor is no part of the model
        return True


FAMILY = QuantizeScaled()

"""clamp: relu, relu6, hardtanh and clamp, which move integers' bounds and nothing else.

    clamp(x, a, b) = min(max(x, a), b), either bound may be None; relu(x) = clamp(x, 0, None)

Rounding is monotone, so on a quantized tensor clamp(q, Q(a), Q(b)) = Q(clamp(x, a, b)) bit for bit, with
Q(v) = clamp(rne(f32(v * f32(1 / s))) + z, 0, 255). Q(0) is the zero point: a relu is low = z.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.clamps import clamp_of
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, replace
from fxq.pattern import Any, Miss, Op
from fxq.qdq import dequantize, integer_bounds, quantize
from fxq.spelling import CLAMP, float_bounds

_SOURCE = Op({dequantize}, Any("q"), Any("scale"), Any("zero_point"), shared=True)
_LOWERED = Op({quantize}, clamp_of(_SOURCE), Any("scale"), Any("zero_point"))


@dataclass(frozen=True)
class Clamp(Family):
    """A clamp that no product swallowed: it runs on the integers that pass through. Two in a row stay two."""

    name: str = "clamp"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Any clamp with constant bounds of a float32 tensor."""
        if float_bounds(node) is None:
            return None
        source = node.args[0]
        return Claim("carry", (source,)) if isinstance(source, Node) and is_float_tensor(source) else None

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(clamp(dequantize(q, s, z), a, b), s, z) -> clamp(q, Q(a), Q(b))."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        bounds = float_bounds(match.node("clamp"))
        assert bounds is not None, "normalize_pointwise leaves constant bounds, claim took no others"
        qparams = match["scale"], match["zero_point"]
        replace(gm, node, CLAMP, (match["q"], *integer_bounds(bounds, *qparams)), qparams)
        return True


FAMILY = Clamp()

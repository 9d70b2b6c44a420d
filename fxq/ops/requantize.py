"""requantize: integers of one scale become integers of another.

    q_y = clamp(rne(f32((q - z_x) * m)) + z_y, 0, 255), m = f32(s_x / s_y)

It stands where a quantized value is wanted with other parameters. NumPy truth: `fxq.numerics.requantize`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.family import Family
from fxq.graph import replace
from fxq.numerics import f32
from fxq.pattern import Any, Match, Op
from fxq.qdq import dequantize, quantize, requantize
from fxq.qtypes import ACT_QMAX, ACT_QMIN

_PATTERN = Op({quantize}, Op({dequantize}, Any("q"), Any("s_x"), Any("z_x"), shared=True), Any("s_y"), Any("z_y"))


@dataclass(frozen=True)
class Requantize(Family):
    """A dequantize met by a quantize with other parameters."""

    name: str = "requantize"

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(dequantize(q, s_x, z_x), s_y, z_y) -> requantize."""
        match = _PATTERN.match(node)
        if not isinstance(match, Match):
            return False
        multiplier = f32(match["s_x"] / match["s_y"])
        args = (match["q"], match["z_x"], multiplier, match["z_y"], ACT_QMIN, ACT_QMAX)
        replace(gm, node, requantize, args, (match["s_y"], match["z_y"]))
        return True


FAMILY = Requantize()

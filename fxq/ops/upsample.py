"""upsample: a larger image from a smaller one, by copies of the nearest pixel or by bilinear means.

    qupsample_nearest   q_y[..., o] = q_x[..., min(floor(f32(o * step)), size - 1)]
    qupsample_bilinear  q_y = rne(f32(f32(t * u0) + f32(b * u1))), t = f32(f32(q00 * v0) + f32(q01 * v1)), b likewise
    qupsample_bilinear_fixed   q_y = t * u0 + b * u1 + 2**21 >> 22, t = q00 * v0 + q01 * v1, weights in steps of 2**-11

x: uint8 [B, C, *spatial], four dimensions for bilinear; scales: the factors that were asked for, 0 where only the size
was; step: source pixels per output pixel, steps the same in units of 2**-32. Scale and zero point stay those of x: the
weights of a mean add up to 1. Results are channels-last in memory. NumPy truth: the functions of the same names in
`fxq.numerics`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, replace
from fxq.layout import empty, from_numpy
from fxq.pattern import Any as Operand
from fxq.pattern import Match, Op
from fxq.qdq import dequantize, expect_dtype, quantize
from fxq.spelling import INTERPOLATE


def _portable(name: str) -> Any:
    """NumPy itself, whose float32 steps are those of the contract."""
    function = getattr(numerics, name)

    def run(x: Tensor, size: list[int], scales: list[Any], *rest: Any) -> Tensor:
        expect_dtype(name, "x", x, torch.uint8)
        fits = x.dim() == 2 + len(size) and len(size) == len(scales) and min(x.shape[2:], default=0) >= 1
        if not (fits and all(scale >= 0 for scale in scales)):
            raise ValueError(f"fxq::{name}: x has shape {list(x.shape)}, size is {size}, scales {scales}")
        return from_numpy(function(x.numpy(), size, scales, *rest))

    return run


qupsample_nearest = kernels.define(
    "qupsample_nearest(Tensor x, int[] size, float[] scales) -> Tensor",
    _portable("qupsample_nearest"),
    lambda x, size, scales: empty(x, x.shape[1], size, x.dtype),
)
qupsample_bilinear = kernels.define(
    "qupsample_bilinear(Tensor x, int[] size, float[] scales, bool align_corners) -> Tensor",
    _portable("qupsample_bilinear"),
    lambda x, size, scales, align_corners: empty(x, x.shape[1], size, x.dtype),
)
qupsample_bilinear_fixed = kernels.define(
    "qupsample_bilinear_fixed(Tensor x, int[] size, int[] steps, bool align_corners) -> Tensor",
    _portable("qupsample_bilinear_fixed"),
    lambda x, size, steps, align_corners: empty(x, x.shape[1], size, x.dtype),
)

_OPTIONS = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
_PATTERN = Op(
    {quantize},
    Op(
        {INTERPOLATE},
        Op({dequantize}, Operand("x"), Operand("scale"), Operand("zero_point"), shared=True),
        *map(Operand, _OPTIONS),
    ),
    Operand("scale"),
    Operand("zero_point"),
)


@dataclass(frozen=True)
class Upsample(Family):
    """Bilinear interpolation of images; the nearest neighbour is a move."""

    name: str = "upsample"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A carry: means of values of one range stay in that range."""
        if node.op != "call_function" or node.target is not INTERPOLATE or node.args[3] != "bilinear":
            return None
        x, antialias = node.args[0], node.args[6]
        if not isinstance(x, Node) or not is_float_tensor(x) or antialias or node.args[5] or not _is_known(node):
            return None
        return Claim("carry", (x,))

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(interpolate(dequantize)) -> qupsample_bilinear; the nearest of uint8 -> qupsample_nearest."""
        if node.target is INTERPOLATE and node.args[3] == "nearest" and "qparams" in node.meta and _is_known(node):
            x, size, factor, *_, recompute, _ = node.args
            rank = len(node.meta["value"].shape) - 2
            operands = _geometry(gm, node, x, size, factor, rank, recompute)
            replace(gm, node, qupsample_nearest, operands, node.meta["qparams"])
            return True
        match = _PATTERN.match(node)
        if not isinstance(match, Match):
            return False
        operands = _geometry(gm, node, match["x"], match["size"], match["scale_factor"], 2, False)
        align_corners, qparams = bool(match["align_corners"]), (match["scale"], match["zero_point"])
        replace(gm, node, qupsample_bilinear, (*operands, align_corners), qparams)
        return True


def _is_known(node: Node) -> bool:
    """Whether the factor is a number or several; a size may be computed at run time."""
    factor = node.args[2]
    return all(isinstance(f, int | float | None) for f in (factor if isinstance(factor, tuple | list) else (factor,)))


def _geometry(
    gm: GraphModule, node: Node, x: Any, size: Any, factor: Any, rank: int, recompute: Any
) -> tuple[Any, ...]:
    """x, the size of the result, and the factors that torch computes with: 0 where it takes the sizes' quotient."""
    if isinstance(size, Node) and not isinstance(size.meta.get("value"), int):
        return x, size, (0.0,) * rank
    if size is not None:
        return x, (tuple(size) if isinstance(size, tuple | list) else (size,) * rank), (0.0,) * rank
    factors = tuple(factor) if isinstance(factor, tuple | list) else (factor,) * rank
    with gm.graph.inserting_before(node):
        sizes = tuple(_scaled(gm, x, dim, f) for dim, f in enumerate(factors, 2))
    return x, sizes, ((0.0,) * rank if recompute else tuple(map(float, factors)))


def _scaled(gm: GraphModule, x: Node, dim: int, factor: float) -> Node:
    """floor(x.size(dim) * factor), as torch computes the size of the result."""
    size = gm.graph.call_method("size", (x, dim))
    return gm.graph.call_function(math.floor, (gm.graph.call_function(operator.mul, (size, float(factor))),))


FAMILY = Upsample()

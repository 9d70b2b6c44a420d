"""engine: products, sums and averages with the roundings of one of torch's engines (`fxq.numerics.engines`).

    fbgemm    quantize_scaled(qlinear_float(x, w, corrections, 1, b / a), a / s_y, 1, z_y), and a clamp for a relu
    onednn    quantize_onednn(qlinear_float(x, w, corrections, r(s_x)), r(s_w), b, relu, r(s_y), z_y)
    qnnpack   qlinear(x, w, corrections + rne(b / a), a / s_y, z_y, low, 255)

convolutions likewise with qconv_float and qconv, channels last for the quantize (onednn: s_w in the place of r(s_w));
where the input is quantized as the model runs, qlinear_dynamic_engine(x, w, column_sums, s_w, b, engine, steps);
qadd_engine(a, b, ...); qmul and qadaptive_avg_pool with multipliers of the engine's. The sums are those of the ops that
fxq has anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any as Value

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.errors import QuantizationError
from fxq.family import Family
from fxq.graph import call, constant, get_attr, place_of, replace, set_constant
from fxq.ops.add_engine import qadd_engine
from fxq.ops.conv import conv_clamp, qconv, qconv_float
from fxq.ops.linear import linear_clamp, qlinear, qlinear_float
from fxq.ops.linear_dynamic_engine import qlinear_dynamic_engine
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool
from fxq.ops.quantize_engine import quantize_fused, quantize_onednn
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.packing import packed_constant, shared_constant, sibling
from fxq.pattern import Any, Const, Match, OneOf, Op, Pattern
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, quantize
from fxq.qtypes import ACT_QMAX
from fxq.spelling import ADAPTIVE_AVG_POOLS, ADD, CLAMP, CONVS, LINEAR, MUL, RELU

SCALES = "scales"
"""In a dequantize_weight's `meta`: its scales before they were rounded to float32, float64 [N]."""
AFFINE = "affine"
"""In a dequantize_weight's `meta`: whether torch's integers had zero points other than 0."""
FUSED = "fused"
"""In a quantize's `meta`: it rounds as torch quantizes tensors."""

STEPS = "steps"
"""In a fake_quantize_rows's `meta`: into how many steps torch divides the range, which for it is that of all rows."""

_WEIGHT_AND_BIAS = (Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True, name="weight"), Any("bias"))
_X = Op({dequantize}, Any("x"), Any("s_x"), Any("z_x"), shared=True)
_OPERANDS = (_X, *_WEIGHT_AND_BIAS)
_WINDOW = tuple(map(Any, ("stride", "padding", "dilation", "groups")))
_BOUNDS = Any("low"), Any("high")
_TERMS = (
    Op({dequantize}, Any("a"), Any("s_a"), Any("z_a"), shared=True),
    Op({dequantize}, Any("b"), Any("s_b"), Any("z_b"), shared=True),
)


def _quantized(*sources: Pattern) -> Op:
    return Op({quantize}, OneOf(*sources), Any("s_y"), Any("z_y"))


_DYNAMIC = Op({LINEAR}, Op({fake_quantize_rows}, Any("x"), shared=True, name="rows"), *_WEIGHT_AND_BIAS)
_PRODUCTS = _quantized(
    Op({LINEAR}, *_OPERANDS, name="product"),
    Op({linear_clamp}, *_OPERANDS, *_BOUNDS, name="product"),
    Op(CONVS, *_OPERANDS, *_WINDOW, name="product"),
    Op({conv_clamp}, *_OPERANDS, *_WINDOW, *_BOUNDS, name="product"),
)
_PAIR = Op({ADD, MUL}, *_TERMS, name="pair")
_PAIRS = _quantized(_PAIR, Op({RELU}, _PAIR, name="relu"))
_AVERAGES = _quantized(Op(ADAPTIVE_AVG_POOLS, _X, Any("sizes")))


@dataclass(frozen=True)
class Engine(Family):
    """The family that lowers linears as `engine` computes them; it claims nothing, and stands before the others."""

    engine: str

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.engine

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """What is quantized, linear(fake_quantize_rows) and quantize, as the engine rounds them."""
        ways = (_PRODUCTS, self._lower), (_PAIRS, self._lower_pair), (_AVERAGES, self._lower_average)
        for pattern, lower in (*ways, (_DYNAMIC, self._lower_dynamic)):
            match = pattern.match(node)
            if isinstance(match, Match):
                lower(gm, match)
                return True
        if node.target is quantize and FUSED in node.meta:
            x, scale, zero_point = node.args
            qparams = node.meta["qparams"]
            replace(gm, node, quantize_fused, (x, scale, zero_point), qparams)
            return True
        return False

    def _lower(self, gm: GraphModule, match: Match) -> None:
        root, product = match.root, match.node("product")
        w = constant(gm, match.node("w")).numpy()
        s_w = np.broadcast_to(constant(gm, match.node("s_w")).numpy(), len(w)).copy()
        s_x, z_x, s_y, z_y, b = (match[name] for name in ("s_x", "z_x", "s_y", "z_y", "bias"))
        bias = constant(gm, b).detach().numpy() if isinstance(b, Node) else None
        relu = product.target in (linear_clamp, conv_clamp)
        corrections = numerics.fold_bias(None, w.reshape(len(w), -1), s_x, z_x, s_w)
        stem = str(match.node("w").target).removesuffix("_int8")
        qparams = (s_y, z_y)
        geometry: tuple[Value, ...] = ()
        if w.ndim > 2:
            if self.engine == "fbgemm":
                _expect_no_saturation(product, w, match["groups"], match.node("weight").meta.get(AFFINE, False))
            padding = tuple(edge for size in match["padding"] for edge in (size, size))
            window = numerics.Window(w.shape[2:], match["stride"], padding, match["dilation"], match["groups"])
            geometry = str(window), z_x

        def node(name: str, value: npt.NDArray[np.generic]) -> Node:
            return get_attr(gm, set_constant(gm, f"{stem}_{name}", torch.from_numpy(value)), product)

        def product_of(*operands: Value) -> Node:
            """The float product, its channels last."""
            x, addend = match["x"], operands[3:]
            if not geometry:
                return call(gm, qlinear_float, (x, *operands), product)
            y = call(gm, qconv_float, (x, *operands[:3], *geometry, *addend), product)
            return call(gm, torch.permute, (y, (0, *range(2, w.ndim), 1)), product)

        with gm.graph.inserting_before(root):
            packed = node("packed", numerics.pack_conv(w, match["dilation"], match["groups"]) if geometry else
                          numerics.pack(w))  # fmt: skip
            if self.engine == "qnnpack":
                steps, multiplier = numerics.qnnpack_constants(bias, s_x, s_w, s_y)
                folded = node("bias_i32", (corrections + steps.astype(np.int64)).astype(np.int32))
                rest = (*geometry, z_y, z_y if relu else 0, 255)
                args = (match["x"], packed, folded, node("multiplier", multiplier), *rest)
                replace(gm, root, qconv if geometry else qlinear, args, qparams, product)
                return
            folded = node("bias_i32", corrections.astype(np.int32))
            behind: list[tuple[Callable[..., Value], tuple[Value, ...]]]
            if self.engine == "fbgemm":
                offset, multiplier = numerics.fbgemm_constants(bias, s_x, s_w, s_y)
                y = product_of(packed, folded, node("one", np.ones_like(multiplier)), node("offset", offset))
                behind = [(quantize_scaled, (node("multiplier", multiplier), 1.0, z_y))]
                behind += [(CLAMP, (z_y, ACT_QMAX))] if relu else []
            else:
                y = product_of(packed, folded, node("multiplier", np.full(len(w), numerics.onednn_scales(s_x))))
                added = node("added", np.zeros(len(w), np.float32) if bias is None else bias)
                factor = node("factor", s_w if geometry else numerics.onednn_scales(match.node("weight").meta[SCALES]))
                behind = [(quantize_onednn, (factor, added, relu, float(numerics.onednn_scales(s_y)), z_y))]
            if geometry:
                behind.append((torch.permute, ((0, w.ndim - 1, *range(1, w.ndim - 1)),)))
            for target, rest in behind[:-1]:
                y = call(gm, target, (y, *rest), product, qparams)
        target, rest = behind[-1]
        replace(gm, root, target, (y, *rest), qparams, product)

    def _lower_pair(self, gm: GraphModule, match: Match) -> None:
        relu = "relu" in match.bound
        a, b, s_a, z_a, s_b, z_b, s_y, z_y = (
            match[name] for name in ("a", "b", "s_a", "z_a", "s_b", "z_b", "s_y", "z_y")
        )
        if match.node("pair").target is MUL:
            multiplier = numerics.qmul_multiplier(s_a, s_b, s_y)
            replace(gm, match.root, qmul, (a, b, multiplier, z_a, z_b, z_y, z_y if relu else 0, ACT_QMAX), (s_y, z_y))
        else:
            args = (a, b, s_a, z_a, s_b, z_b, s_y, z_y, relu, self.engine)
            replace(gm, match.root, qadd_engine, args, (s_y, z_y))

    def _lower_average(self, gm: GraphModule, match: Match) -> None:
        """Of all pixels. fbgemm and onednn average the integers as they are, whatever their zero point."""
        x, scale, zero_point = match.node("x"), match["s_y"], match["z_y"]
        if self.engine == "qnnpack":
            count = math.prod(x.meta["value"].shape[2:])
            rest = (zero_point, numerics.average_multiplier(scale, count) * count, zero_point)
        else:
            rest = (0, 1.0, 0)
        replace(gm, match.root, qadaptive_avg_pool, (x, match["sizes"], *rest, 0, ACT_QMAX), (scale, zero_point))

    def _lower_dynamic(self, gm: GraphModule, match: Match) -> None:
        linear, path = match.root, str(match.node("w").target)
        w = constant(gm, match.node("w")).numpy()
        scales = match.node("weight").meta[SCALES]
        scale = numerics.onednn_scales(scales) if self.engine == "onednn" else scales.astype(np.float32)
        column_sums = w.astype(np.int32).sum(axis=1, dtype=np.int32)
        steps = ACT_QMAX if self.engine == "qnnpack" else match.node("rows").meta[STEPS]  # qnnpack reduces no range
        with gm.graph.inserting_before(linear):
            constants = (
                packed_constant(gm, path, w),
                shared_constant(gm, sibling(path, "column_sums"), torch.from_numpy(column_sums)),
                shared_constant(gm, sibling(path, f"{self.engine}_scale"), torch.from_numpy(scale)),
            )
            operands = (match["x"], *(get_attr(gm, constant, linear) for constant in constants))
        replace(gm, linear, qlinear_dynamic_engine, (*operands, match["bias"], self.engine, steps))


def _expect_no_saturation(conv: Node, w: numerics.I8, groups: int, affine: bool) -> None:
    """Raise where fbgemm's kernel of a depthwise convolution, which adds products in pairs in int16, can saturate.

    Which pairs it adds is fbgemm's own affair: it has kernels for some sizes of window, each with an order of its own.
    """
    if affine and groups == len(w):
        raise QuantizationError(
            f"{place_of(conv)}: exact='fbgemm' does not cover a depthwise convolution whose weights have zero points: "
            "fbgemm adds the products of the integers as they are two by two in 16 bits, which may saturate; quantize "
            "its weights symmetrically or import it with exact=None"
        )
    flat = np.abs(w.reshape(len(w), -1).astype(np.int32))
    if groups == len(w) and w.shape[1] == 1 and flat.shape[1] > 1:
        two = np.sort(flat, 1)[:, -2:].sum(1).max()
        if ACT_QMAX * two >= 2**15:
            raise QuantizationError(
                f"{place_of(conv)}: exact='fbgemm' does not cover this depthwise convolution: fbgemm adds its products "
                f"two by two in 16 bits, which {ACT_QMAX} * {two} exceeds; import it with exact=None"
            )

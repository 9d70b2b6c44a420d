"""engine: a linear and a quantize with the roundings of one of torch's engines (`fxq.numerics.engines`).

    fbgemm    quantize_scaled(qlinear_float(x, w, corrections, 1, b / a), a / s_y, 1, z_y), and a clamp for a relu
    onednn    quantize_onednn(qlinear_float(x, w, corrections, r(s_x)), r(s_w), b, relu, r(s_y), z_y)
    qnnpack   qlinear(x, w, corrections + rne(b / a), a / s_y, z_y, low, 255)

and, where the input is quantized as the model runs, qlinear_dynamic_engine(x, w, column_sums, s_w, b, engine, steps).
The sums are those of the ops that fxq has anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.family import Claim, Refusal
from fxq.graph import call, constant, get_attr, replace, set_constant
from fxq.ops.linear import linear_clamp, qlinear, qlinear_float
from fxq.ops.linear_dynamic_engine import qlinear_dynamic_engine
from fxq.ops.quantize_engine import quantize_fused, quantize_onednn
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.packing import packed_constant, shared_constant, sibling
from fxq.pattern import Any, Const, Match, Op
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, quantize
from fxq.qtypes import ACT_QMAX
from fxq.spelling import CLAMP, LINEAR

SCALES = "scales"
"""In a dequantize_weight's `meta`: its scales before they were rounded to float32, float64 [N]."""
FUSED = "fused"
"""In a quantize's `meta`: it rounds as torch quantizes tensors."""

STEPS = "steps"
"""In a fake_quantize_rows's `meta`: into how many steps torch divides the range, which for it is that of all rows."""

_WEIGHT_AND_BIAS = (Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True, name="weight"), Any("bias"))
_OPERANDS = (Op({dequantize}, Any("x"), Any("s_x"), Any("z_x"), shared=True), *_WEIGHT_AND_BIAS)
_DYNAMIC = Op({LINEAR}, Op({fake_quantize_rows}, Any("x"), shared=True, name="rows"), *_WEIGHT_AND_BIAS)
_PRODUCTS = (
    Op({quantize}, Op({LINEAR}, *_OPERANDS, name="linear"), Any("s_y"), Any("z_y")),
    Op({quantize}, Op({linear_clamp}, *_OPERANDS, Any("low"), Any("high"), name="linear"), Any("s_y"), Any("z_y")),
)


@dataclass(frozen=True)
class Engine:
    """The family that lowers linears as `engine` computes them; it claims nothing, and stands before the others."""

    engine: str

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.engine

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """No float operation: what is imported has been decided on."""
        return None

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """Linears swallow their relus themselves."""
        return False

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(linear), linear(fake_quantize_rows) and quantize, as the engine rounds them."""
        for pattern in _PRODUCTS:
            match = pattern.match(node)
            if isinstance(match, Match):
                self._lower(gm, match)
                return True
        match = _DYNAMIC.match(node)
        if isinstance(match, Match):
            self._lower_dynamic(gm, match)
            return True
        if node.target is quantize and FUSED in node.meta:
            x, scale, zero_point = node.args
            qparams = node.meta["qparams"]
            replace(gm, node, quantize_fused, (x, scale, zero_point), qparams)
            return True
        return False

    def _lower(self, gm: GraphModule, match: Match) -> None:
        root, linear = match.root, match.node("linear")
        w = constant(gm, match.node("w")).numpy()
        s_w = np.broadcast_to(constant(gm, match.node("s_w")).numpy(), len(w)).copy()
        s_x, z_x, s_y, z_y, b = (match[name] for name in ("s_x", "z_x", "s_y", "z_y", "bias"))
        bias = constant(gm, b).detach().numpy() if isinstance(b, Node) else None
        relu = linear.target is linear_clamp
        corrections = numerics.fold_bias(None, w, s_x, z_x, s_w)
        stem = str(match.node("w").target).removesuffix("_int8")
        qparams = (s_y, z_y)

        def node(name: str, value: npt.NDArray[np.generic]) -> Node:
            return get_attr(gm, set_constant(gm, f"{stem}_{name}", torch.from_numpy(value)), linear)

        with gm.graph.inserting_before(root):
            packed = node("packed", numerics.pack(w))
            if self.engine == "qnnpack":
                steps, multiplier = numerics.qnnpack_constants(bias, s_x, s_w, s_y)
                folded = node("bias_i32", (corrections + steps.astype(np.int64)).astype(np.int32))
                args = (match["x"], packed, folded, node("multiplier", multiplier), z_y, z_y if relu else 0, 255)
                replace(gm, root, qlinear, args, qparams, linear)
                return
            folded = node("bias_i32", corrections.astype(np.int32))
            if self.engine == "fbgemm":
                offset, multiplier = numerics.fbgemm_constants(bias, s_x, s_w, s_y)
                ones = node("one", np.ones_like(multiplier))
                y = call(gm, qlinear_float, (match["x"], packed, folded, ones, node("offset", offset)), linear)
                factor = node("multiplier", multiplier)
                q = replace(gm, root, quantize_scaled, (y, factor, 1.0, z_y), qparams, linear)
                if relu:
                    with gm.graph.inserting_after(q):
                        clamp = call(gm, CLAMP, (q, z_y, 255), q, qparams)
                    q.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)
                return
            scale = node("multiplier", np.full(len(w), numerics.onednn_scales(s_x)))
            y = call(gm, qlinear_float, (match["x"], packed, folded, scale), linear)
            added = node("added", np.zeros(len(w), np.float32) if bias is None else bias)
            factor = node("factor", numerics.onednn_scales(match.node("weight").meta[SCALES]))
            scale_y = float(numerics.onednn_scales(s_y))
            replace(gm, root, quantize_onednn, (y, factor, added, relu, scale_y, z_y), qparams, linear)

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

"""calibrate: statistics become scales and zero points; each observer becomes a quantize/dequantize pair.

Under `Recipe(outputs="uint8")` the model's output reads the integers.

What is quantized row by row as the model runs becomes one op, which computes what such a pair would.

The only pass that approximates. The data has run before it (`fxq.calibrate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.graph import bypass, call, constant, get_attr, is_size, replace, set_constant, submodule
from fxq.observers import Observer, RoundedWeight, Rows, WeightObserver
from fxq.outputs import is_exit, output_qparams
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, integers_of, quantize, quantize_weight
from fxq.sampling import SAMPLE, sample_of
from fxq.stages import Stage


@dataclass(frozen=True)
class Calibrate:
    """See the module's docstring."""

    name: str = "calibrate"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.QDQ
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Raises `CalibrationError` naming the value that no data has reached."""
        found = [
            n
            for n in gm.graph.nodes
            if n.op == "call_module" and isinstance(submodule(gm, n), Observer | Rows | WeightObserver)
        ]
        for node in found:
            observer = submodule(gm, node)
            if isinstance(observer, Rows):
                replace(gm, node, fake_quantize_rows, node.args)
                continue
            pair = _activation(gm, node, observer) if isinstance(observer, Observer) else _weight(gm, node)
            # Who asks for a size only asks the integers, so that no float copy is made to be measured.
            node.replace_all_uses_with(pair.args[0], delete_user_cb=is_size)
            if ctx.recipe.outputs == "uint8":
                node.replace_all_uses_with(pair.args[0], delete_user_cb=is_exit)
            bypass(gm, node, pair)
        if ctx.recipe.outputs == "uint8":
            qparams = output_qparams(gm.graph)
            ctx.report.notes += [
                f"output {i} is uint8, scale {q.scale:.6g}, zero point {q.zero_point}"
                for i, q in enumerate(qparams)
                if q is not None
            ]
        if found:
            gm.delete_submodule("observers")
        if sample_of(gm) is not None:
            gm.delete_submodule(SAMPLE)
        return len(found)


def _activation(gm: GraphModule, node: Node, observer: Observer) -> Node:
    qparams = observer.qparams()
    operands = (qparams.scale, qparams.zero_point)
    with gm.graph.inserting_before(node):
        q = call(gm, quantize, (node.args[0], *operands), node, operands)
        return call(gm, dequantize, (q, *operands), node, dtype=torch.float32)


def _weight(gm: GraphModule, node: Node) -> Node:
    observer, w = submodule(gm, node), node.args[0]
    assert isinstance(observer, WeightObserver) and isinstance(w, Node)
    settled = isinstance(observer, RoundedWeight) or observer.factors is not None  # and of no one else
    weight, dtype = constant(gm, w), constant(gm, w).dtype
    integers, s_w = integers_of(observer, weight) if settled else (None, observer.scales_of(weight))
    with gm.graph.inserting_before(node):
        scales = get_attr(gm, set_constant(gm, f"{w.target}_scale", s_w.clone()), node)
        if integers is None:
            q = call(gm, quantize_weight, (w, scales), node, dtype=torch.int8)
        else:
            q = get_attr(gm, set_constant(gm, f"{w.target}_int8", integers), node)
        return call(gm, dequantize_weight, (q, scales, *([] if dtype == torch.float32 else [dtype])), node, dtype=dtype)


PASS = Calibrate()

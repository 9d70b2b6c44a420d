"""fuse_activation: an activation behind a linear or convolution becomes its epilogue, as does the quantize behind it.

    gelu(qlinear_float(x, ...))                ->  qlinear_act(x, ..., "gelu")
    gelu(qlinear_dynamic(x, ...))              ->  qlinear_dynamic(x, ..., activation="gelu"); so a relu or clamp
    quantize(qlinear_act(...), s, z)           ->  qlinear_act_quantize(..., s, z), or scaled
    quantize(silu(qconv_float(...)), s, z)     ->  qconv_act_quantize(..., "silu", s, z)

Only where no one else reads what stands between. fxq's activations are its own polynomials (`fxq.numerics`): the same
bits everywhere, and as near to torch's as what stands behind an int8 product is worth; gelu is off by 2e-4 at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from fxq import graph
from fxq.ops.activation import activation_of, qlinear_act, qlinear_act_quantize
from fxq.ops.conv import qconv_act_quantize, qconv_float
from fxq.ops.linear import qlinear_float
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.spelling import float_bounds
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseActivation:
    """See the module's docstring."""

    name: str = "fuse-activation"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a quantize finds the activation before it fused."""
        count, fused = 0, set()
        for node in list(gm.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, Node) or len(source.users) != 1:
                continue
            activation = activation_of(gm, node) if source.target in (qlinear_float, qlinear_dynamic) else None
            if source.target is qlinear_dynamic and len(source.args) <= 6 and "aliases" not in node.meta:
                bounds = float_bounds(node)
                if activation is not None or bounds is not None:
                    fused.add(node.meta.get("source"))
                    operands = *source.args, *(None,) * (6 - len(source.args)), activation or "", *(bounds or ())
                    graph.replace(gm, node, qlinear_dynamic, operands, like=source)
                    count += 1
            elif activation is not None:
                fused.add(node.meta.get("source"))
                x, w, b, m, *addend = source.args
                graph.replace(gm, node, qlinear_act, (x, w, b, m, activation, *addend), like=source)
                count += 1
            elif node.target in (quantize, quantize_scaled) and source.target is qlinear_act and len(source.args) == 5:
                *factor, scale, zero_point = node.args[1:]
                assert isinstance(scale, float) and isinstance(zero_point, int)
                qparams = scale, zero_point
                graph.replace(gm, node, qlinear_act_quantize, (*source.args, *qparams, *factor), qparams, like=source)
                count += 1
            elif node.target is quantize and (conv := _activated_conv(gm, source)) is not None:
                fused.add(source.meta.get("source"))
                operands, activation = conv.args[:6], activation_of(gm, source)
                scale, zero_point = node.args[1:]
                assert isinstance(scale, float) and isinstance(zero_point, int)
                qparams = scale, zero_point
                graph.replace(gm, node, qconv_act_quantize, (*operands, activation, *qparams), qparams, like=conv)
                count += 1
        ctx.report.decisions = [
            replace(d, form="int8", reason=None, detail="in the epilogue of the product, in float32")
            if d.node in fused
            else d
            for d in ctx.report.decisions
        ]
        return count


def _activated_conv(gm: GraphModule, activation: Node) -> Node | None:
    """The convolution before an activation that only it feeds; None where there is none, or its bias is float."""
    conv = activation.args[0] if activation.args else None
    if not isinstance(conv, Node) or conv.target is not qconv_float or len(conv.users) != 1:
        return None
    return None if conv.args[6] is not None or activation_of(gm, activation) is None else conv


PASS = FuseActivation()

"""fuse_activation: gelu, silu, tanh or sigmoid behind a linear becomes its epilogue, as does the quantize behind it.

    gelu(qlinear_float(x, ...))          ->  qlinear_act(x, ..., "gelu")
    quantize(qlinear_act(...), s, z)     ->  qlinear_act_quantize(..., s, z), with a factor per channel where scaled

Only where no one else reads what stands between. fxq's activations are its own polynomials (`fxq.numerics`): the same
bits everywhere, within a few units in the last place of torch's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from fxq import graph
from fxq.ops.activation import activation_of, qlinear_act, qlinear_act_quantize
from fxq.ops.linear import qlinear_float
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseActivation:
    """See the module's docstring."""

    name: str = "fuse-activation"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a quantize finds the activation before it fused."""
        count, fused = 0, set()
        for node in list(gm.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, Node) or len(source.users) != 1:
                continue
            activation = activation_of(gm, node) if source.target is qlinear_float else None
            if activation is not None:
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
        ctx.report.decisions = [
            replace(d, form="int8", reason=None, detail="in the epilogue of linear, in float32")
            if d.node in fused
            else d
            for d in ctx.report.decisions
        ]
        return count


PASS = FuseActivation()

"""fuse_norm: a layer norm or RMS norm becomes an op of fxq's own, and the quantize behind it a part of that.

    layer_norm(x, [K], w, b, eps)                    ->  norm(x, "layer_norm", w, b, eps)
    quantize(norm(...), s, z)                        ->  norm_quantize(..., s, z)
    norm(...) read in float, quantize(norm(...))     ->  norm_and_quantize(..., s, z): one pass gives both

quantize_scaled likewise, with its factor. A norm that several quantize differently takes the first of them. What the
recipe keeps float stays torch's. fxq's norms sum in an order of their own (`fxq.numerics`): the same bits everywhere,
within float rounding of torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

from torch.fx import GraphModule, Node

from fxq.decisions import Reason
from fxq.graph import Value, bypass, call, get_attr, replace
from fxq.ops.norm import Call, norm, norm_and_quantize, norm_of, norm_quantize
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.spelling import GETITEM
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseNorm:
    """See the module's docstring."""

    name: str = "fuse-norm"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """From the last node to the first, so that the longest hand-written norm wins; then what quantizes them."""
        excluded = {d.node for d in ctx.report.decisions if d.reason is Reason.USER_EXCLUDED}
        norms, parts = [], set()
        for node in reversed(list(gm.graph.nodes)):
            if node._erased or "aliases" in node.meta or node.meta.get("source") in excluded:
                continue
            found = norm_of(gm, node)
            if found is not None:
                parts |= {part.meta.get("source") for part in found.parts}
                norms.append(_write(gm, node, found))
        count = len(norms) + sum(_take_quantize(gm, node) for node in norms)
        ctx.report.decisions = [
            changed(d, reason=Reason.OWN_FLOAT, detail="a part of the norm") if d.node in parts else d
            for d in ctx.report.decisions
        ]
        return count


def _write(gm: GraphModule, node: Node, found: Call) -> Node:
    with gm.graph.inserting_before(node):
        rows = [get_attr(gm, row, node) if isinstance(row, str) else row for row in (found.weight, found.bias)]
    return replace(gm, node, norm, (found.x, found.kind, *rows, found.eps))


def _take_quantize(gm: GraphModule, node: Node) -> int:
    """Let the norm at `node` write the integers of the first quantize that reads it."""
    readers = [user for user in node.users if user.target in (quantize, quantize_scaled)]
    if not readers:
        return 0
    first = readers[0]
    *factor, scale, zero_point = first.args[1:]
    assert isinstance(scale, float) and isinstance(zero_point, int)
    operands, qparams = (*node.args, scale, zero_point, *factor), (scale, zero_point)
    if len(node.users) == 1:
        replace(gm, first, norm_quantize, operands, qparams, like=node)
        return 1
    with gm.graph.inserting_before(node):
        for operand in factor:
            assert isinstance(operand, Node)
            node.prepend(operand)
        both = call(gm, norm_and_quantize, operands, node)
        y, q = call(gm, GETITEM, (both, 0), node), call(gm, GETITEM, (both, 1), first, qparams)
    both.meta["value"] = (y.meta["value"], Value(first.meta["value"].dtype, first.meta["value"].shape))
    bypass(gm, first, q)
    bypass(gm, node, y)
    return 1


PASS = FuseNorm()

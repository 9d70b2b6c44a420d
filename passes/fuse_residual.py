"""fuse_residual: an add behind a linear that stays float becomes part of the linear's epilogue.

    qlinear_float(x, ...) + y        ->  qlinear_float(x, ..., y)
    qlinear_dynamic(x, ...) + y      ->  qlinear_dynamic(x, ..., y)

Only where no one else reads the product, and it has no addend yet. Of two linears, the later one adds the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from fxq import graph
from fxq.ops.linear import qlinear_float
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseResidual:
    """See the module's docstring."""

    name: str = "fuse-residual"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Offer each add of two tensors its later operand first."""
        fused = set()
        for node in list(gm.graph.nodes):
            if node.target is not ADD or len(node.args) != 2 or node.kwargs or "aliases" in node.meta:
                continue
            a, b = node.args
            if not (graph.is_float_tensor(a) and graph.is_float_tensor(b)):
                continue
            assert isinstance(a, Node) and isinstance(b, Node)
            for product, other in sorted(((a, b), (b, a)), key=lambda pair: pair[0]._sort_key, reverse=True):
                if _takes(product, other):
                    fused.add(node.meta.get("source"))
                    bias = (None,) if product.target is qlinear_dynamic and len(product.args) == 4 else ()
                    assert callable(product.target)
                    graph.replace(gm, node, product.target, (*product.args, *bias, other), like=product)
                    break
        ctx.report.decisions = [
            replace(d, form="int8", reason=None, detail="in the epilogue of linear, in float32")
            if d.node in fused
            else d
            for d in ctx.report.decisions
        ]
        return len(fused)


def _takes(product: Node, other: Node) -> bool:
    """Whether the linear `product` can add `other`, which may not repeat its channels: a linear with one has none."""
    free = (product.target is qlinear_float and len(product.args) == 4) or (
        product.target is qlinear_dynamic and len(product.args) <= 5
    )
    if not free or len(product.users) != 1:
        return False
    (channels,), shape = product.meta["value"].shape[-1:], other.meta["value"].shape
    return bool(channels > 1 and shape[-1:] == (channels,))


PASS = FuseResidual()

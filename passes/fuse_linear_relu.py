"""fuse_linear_relu: a relu or clamp behind a linear or an add becomes part of it.

    quantize(relu(linear(x, w, b)))  ->  quantize(linear_clamp(x, w, b, 0, None))

Only where the result is quantized (the integer epilogue then clamps for nothing), and only where no one else reads what
stands between.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.spelling import float_bounds
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseLinearRelu:
    """See the module's docstring."""

    name: str = "fuse-linear-relu"
    takes: Stage = Stage.QDQ
    gives: Stage = Stage.QDQ
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Offer each clamp that only a quantize reads to the families."""
        clamps = [node for node in gm.graph.nodes if float_bounds(node) is not None and _only_quantized(node)]
        return sum(any(family.fuse_clamp(gm, clamp) for family in ctx.families) for clamp in clamps)


def _only_quantized(node: Node) -> bool:
    return len(node.users) == 1 and all(user.target is quantize for user in node.users)


PASS = FuseLinearRelu()

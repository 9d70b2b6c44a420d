"""fuse_feed_forward: a linear with an activation, and one behind it whose rows have scales of their own, are one call.

    qlinear_dynamic(qlinear_act(x, ..., "gelu"), ..., addend)      ->  qfeed_forward(x, ..., "gelu", ..., addend)

Only where no one else reads what stands between. What stood there is kept in `meta["inside"]`: text, picture, `compare`
and `golden` still show both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.expansion import Link
from fxq.graph import replace
from fxq.ops.activation import qlinear_act
from fxq.ops.feed_forward import qfeed_forward
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage

_PLAIN = 6
"""Operands of a qlinear_dynamic without activation and clamp."""


@dataclass(frozen=True)
class FuseFeedForward:
    """See the module's docstring."""

    name: str = "fuse-feed-forward"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of pairs fused."""
        count = 0
        for node in list(gm.graph.nodes):
            wide = node.args[0] if node.target is qlinear_dynamic and len(node.args) <= _PLAIN else None
            if isinstance(wide, Node) and wide.target is qlinear_act and len(wide.args) == 5 and len(wide.users) == 1:
                inside = Link.of(wide), Link.of(node)
                fused = replace(gm, node, qfeed_forward, (*wide.args, *node.args[1:]))
                fused.meta["inside"] = inside
                count += 1
        return count


PASS = FuseFeedForward()

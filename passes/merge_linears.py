"""merge_linears: linears that read the same integers become one call.

    qlinear(x, w_q, ...), qlinear(x, w_k, ...), qlinear(x, w_v, ...)  ->  qlinears(x, [w_q, w_k, w_v], ...)[0], [1], [2]

q, k and v, for instance, each of which keeps the scale and zero point of its own: one call instead of three, and output
channels of all three for threads to share. What `fuse_chains` has taken is no qlinear any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.graph import bypass, call
from fxq.ops.linear import qlinear
from fxq.ops.linears import qlinears
from fxq.pipeline import Context, Numbers
from fxq.spelling import GETITEM
from fxq.stages import Stage


@dataclass(frozen=True)
class MergeLinears:
    """See the module's docstring."""

    name: str = "merge-linears"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of calls that took the place of several."""
        groups: dict[Node, list[Node]] = {}
        for node in gm.graph.nodes:
            if node.target is qlinear and isinstance(node.args[0], Node) and "aliases" not in node.args[0].meta:
                groups.setdefault(node.args[0], []).append(node)
        merged = [group for group in groups.values() if len(group) > 1]
        for group in merged:
            _merge(gm, group)
        return len(merged)


def _merge(gm: GraphModule, group: list[Node]) -> None:
    first = group[0]
    lists = tuple(map(list, zip(*(node.args[1:] for node in group), strict=True)))
    for constants in lists[:3]:
        for constant in constants:
            assert isinstance(constant, Node) and constant.op == "get_attr"
            first.prepend(constant)
    with gm.graph.inserting_before(first):
        together = call(gm, qlinears, (first.args[0], *lists), first)
        together.meta["value"] = [node.meta["value"] for node in group]
        together.meta.pop("source", None)
        parts = [call(gm, GETITEM, (together, i), node, node.meta["qparams"]) for i, node in enumerate(group)]
    for node, part in zip(group, parts, strict=True):
        bypass(gm, node, part)


PASS = MergeLinears()

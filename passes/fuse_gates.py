"""fuse_gates: squeeze and excite, an image times what two products make of its means, is one call.

    qmul(x, qconv_act_quantize(qconv(qadaptive_avg_pool(x, 1, ...), ...), ..., "sigmoid", ...))    ->  qgate(x, ...)

Only where no one else reads what stands between, and the convolutions see one pixel. What stood there is kept in
`meta["inside"]`: text, picture, `compare` and `golden` still show all four.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.expansion import Link
from fxq.graph import replace
from fxq.ops.conv import qconv, qconv_act_quantize
from fxq.ops.gate import qgate
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool
from fxq.pipeline import Context, Numbers
from fxq.qtypes import ACT_QMAX, ACT_QMIN
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseGates:
    """See the module's docstring."""

    name: str = "fuse-gates"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of gates fused."""
        return sum(_fuse(gm, node) for node in list(gm.graph.nodes) if node.target is qmul)


def _fuse(gm: GraphModule, node: Node) -> int:
    a, b, m, _, _, *rest = node.args
    for x, gate in ((a, b), (b, a)):
        between = _between(x, gate)
        if between is not None:
            mean, hidden, gate = between
            _, _, z_x, multiplier, z_mean, *_ = mean.args
            activated = hidden.target is qconv_act_quantize
            bounds = (*hidden.args[6:], ACT_QMIN, ACT_QMAX) if activated else ("", 1.0, *hidden.args[6:])
            operands = (x, z_x, multiplier, z_mean, *hidden.args[1:4], *bounds, *gate.args[1:4], *gate.args[6:])
            links = tuple(Link.of(part) for part in (mean, hidden, gate, node))
            fused = replace(gm, node, qgate, (*operands, m, *rest), node.meta["qparams"])
            fused.meta["inside"] = links
            return 1
    return 0


def _between(x: object, gate: object) -> tuple[Node, Node, Node] | None:
    """The mean of `x` and the two products that make `gate` of it; None where it is another product."""
    products = []
    part = gate
    for targets in ((qconv_act_quantize,), (qconv, qconv_act_quantize)):
        if not isinstance(part, Node) or part.target not in targets or len(part.users) != 1:
            return None
        if set(str(part.args[4]).split("x")) != {"1"}:  # a window of one pixel, with stride 1 and without padding
            return None
        products.append(part)
        part = part.args[0]
    if not isinstance(part, Node) or part.target is not qadaptive_avg_pool or len(part.users) != 1:
        return None
    source, sizes, *_, low, high = part.args
    assert isinstance(sizes, tuple)
    whole = set(sizes) == {1} and (low, high) == (ACT_QMIN, ACT_QMAX)
    channels = isinstance(x, Node) and x.meta["value"].shape[1] == products[0].meta["value"].shape[1]
    return (part, products[1], products[0]) if source is x and whole and channels else None


PASS = FuseGates()

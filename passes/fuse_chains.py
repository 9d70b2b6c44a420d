"""fuse_chains: a run of integer linears becomes one call, which keeps a few rows in the cache through all of them.

    quantize -> qlinear -> ... -> qlinear | qlinear_float      ->  qchain | qchain_float

A run begins with a quantize or a qlinear and is at least two operations long. It ends where a value has other readers,
where a weight is shared with another call (it would be stored twice), and at a qlinear_float, whose addend must be
none. What stood there is kept in `meta["inside"]`: text, picture, `compare` and `golden` still show every layer.

A linear that no other pass has taken is a chain of one in the end: its call hands over two tensors instead of four,
which is a third of the time that a layer of 64 x 64 takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.expansion import Link
from fxq.graph import SHARED, common_module, constant, get_attr, line_of, replace, set_constant
from fxq.ops import chain
from fxq.ops.linear import qlinear, qlinear_float
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.qtypes import QParams
from fxq.stages import Stage
from fxq.tracing.origin import Origin


@dataclass(frozen=True)
class FuseChains:
    """See the module's docstring; least: operations of a run."""

    name: str = "fuse-chains"
    least: int = 2
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, each run as long as it gets."""
        count = 0
        if gm.meta.get(SHARED):
            return count
        for node in list(gm.graph.nodes):
            if not node._erased and (node.target is quantize or _is_link(node)):
                links = _run_from(node)
                if len(links) >= self.least and _is_link(links[-1]):
                    _fuse(gm, links)
                    count += 1
        return count


def _is_link(node: Node) -> bool:
    """Whether `node` is a linear that may stand in a chain."""
    if node.target is qlinear or (node.target is qlinear_float and len(node.args) == 4):
        weight = node.args[1]
        assert isinstance(weight, Node)
        others = node.graph.find_nodes(op="get_attr", target=weight.target)
        return others == [weight] and len(weight.users) == 1
    return False


def _run_from(first: Node) -> list[Node]:
    links = [first]
    while links[-1].target is not qlinear_float and len(links[-1].users) == 1:
        reader = next(iter(links[-1].users))
        if not _is_link(reader) or reader.args[0] is not links[-1]:
            break
        links.append(reader)
    return links


def _fuse(gm: GraphModule, links: list[Node]) -> None:
    first, last = links[0], links[-1]
    front = None
    if first.target is quantize:
        _, scale, zero_point = first.args
        assert isinstance(scale, float) and isinstance(zero_point, int)
        front = QParams(scale, zero_point)
    layers = tuple(_layer(gm, node) for node in links if node.target is not quantize)
    to_float = last.target is qlinear_float
    program = chain.encode(chain.Chain(layers, front, to_float))
    inside = tuple(Link.of(node) for node in links)
    module = common_module([node for node in links if node.target is not quantize])
    with gm.graph.inserting_before(last):
        stored = get_attr(gm, set_constant(gm, f"{module}.chain".lstrip("."), program), last)
    target = chain.qchain_float if to_float else chain.qchain
    fused = replace(gm, last, target, (first.args[0], stored), last.meta.get("qparams"))
    fused.meta["inside"] = inside
    fused.meta["origin"] = Origin(module, line_of(last))


def _layer(gm: GraphModule, node: Node) -> chain.Layer:
    x, weight, bias, multiplier, *rest = node.args
    assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(bias, Node) and isinstance(multiplier, Node)
    operands = constant(gm, weight), int(x.meta["value"].shape[-1]), constant(gm, bias), constant(gm, multiplier)
    return chain.Layer(*operands, *rest)  # type: ignore[arg-type]


PASS = FuseChains()
SINGLE = FuseChains("chain-single-linears", least=1)

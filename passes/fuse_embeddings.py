"""fuse_embeddings: embeddings that are added up and normalised become one op.

    norm_and_quantize(qembedding(a, ...) + qembedding(b, ...) + qembedding(c, ...), ...)
                                                                        -> qembedding_norm([a, b, c], ...)

Any number of tables, the sums in the order in which they stand; only where no one else reads what stands between. Ids
broadcast as the rows that they stood for did. Ids that are one and the same number in a constant, repeated to the size
of other ids, as BERT's token types are where none are given, are that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fxq.decisions import Reason
from fxq.graph import constant, get_attr, replace, set_constant
from fxq.ops.embedding import qembedding, qembedding_norm
from fxq.ops.norm import norm_and_quantize
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD, GETITEM
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseEmbeddings:
    """See the module's docstring."""

    name: str = "fuse-embeddings"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of norms that took their embeddings in."""
        count, adds = 0, set()
        for node in list(gm.graph.nodes):
            if node.target is not norm_and_quantize:
                continue
            x, *operands = node.args
            found = _tables(x)
            if found is None or len({table.meta["value"].shape[-1] for table in found[0]}) > 1:
                continue
            tables, sums = found
            adds |= {add.meta.get("source") for add in sums}
            lists = [[table.args[i] for table in tables] for i in range(3)]
            lists[0] = [_one_id(gm, index, lists[0]) for index in lists[0]]
            replace(gm, node, qembedding_norm, (*lists, *operands), like=node)
            count += 1
        ctx.report.decisions = [
            changed(d, reason=Reason.OWN_FLOAT, detail="a part of the embedding, in float32") if d.node in adds else d
            for d in ctx.report.decisions
        ]
        return count


def _tables(node: object) -> tuple[list[Node], list[Node]] | None:
    """The embeddings whose sum `node` is, in the order in which they are added, and the additions."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if node.target is qembedding:
        return [node], []
    if node.target is not ADD or len(node.args) != 2 or node.kwargs or "aliases" in node.meta:
        return None
    a, b = map(_tables, node.args)
    if a is None or b is None or min(len(a[0]), len(b[0])) > 1:
        return None
    first, last = (a, b) if len(b[0]) == 1 else (b, a)
    return [*first[0], *last[0]], [*first[1], *last[1], node]


def _one_id(gm: GraphModule, index: object, others: list[Argument]) -> Node:
    """`index`, or a constant of one number where it is that number repeated to the size of one of `others`."""
    assert isinstance(index, Node)
    if index.target != "expand" or index.kwargs:
        return index
    number, sizes = _number(gm, index), index.args[1:]
    like = [o for o in others if o is not index and all(_is_size_of(size, o, d) for d, size in enumerate(sizes))]
    if number is None or not any(isinstance(o, Node) and len(o.meta["value"].shape) == len(sizes) for o in like):
        return index
    dtype = index.meta["value"].dtype
    with gm.graph.inserting_before(index):
        return get_attr(gm, set_constant(gm, "one_id", torch.full((1,) * len(sizes), number, dtype=dtype)), index)


def _is_size_of(number: object, tensor: object, dim: int) -> bool:
    return isinstance(number, Node) and number.target == "size" and number.args == (tensor, dim)


def _number(gm: GraphModule, node: object) -> int | None:
    """The number that all of `node` is, whatever its size: what a constant of one value is moved or gathered from."""
    while isinstance(node, Node) and "aliases" not in node.meta:
        if node.op == "get_attr":
            values = constant(gm, node)
            return int(values.flatten()[0]) if values.numel() and bool((values == values.flatten()[0]).all()) else None
        if node.target not in ("expand", GETITEM, torch.gather):
            return None
        node = node.args[0]
    return None


PASS = FuseEmbeddings()

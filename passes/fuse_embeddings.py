"""fuse_embeddings: embeddings that are added up and normalised become one op.

    norm_and_quantize(qembedding(a, ...) + qembedding(b, ...) + qembedding(c, ...), ...)
                                                                        -> qembedding_norm([a, b, c], ...)

Any number of tables, the sums in the order in which they stand; only where no one else reads what stands between. Ids
broadcast as the rows that they stood for did.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

from torch.fx import GraphModule, Node

from fxq.decisions import Reason
from fxq.graph import replace
from fxq.ops.embedding import qembedding, qembedding_norm
from fxq.ops.norm import norm_and_quantize
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD
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
            lists = tuple([table.args[i] for table in tables] for i in range(3))
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


PASS = FuseEmbeddings()

"""fold_heads: an attention finds its heads in the rows that linears give; the views that spelled them out go.

    attention(reshape(q, (b, t, H, D)).transpose(1, 2), ...).transpose(1, 2).reshape(b, t, H * D)
                                                         ->  qattention(q, k, v, ..., heads=H)
    x.size(1), x of the shape that r has                 ->  r.size(1): sizes are asked of the value they come from

Only where the graph itself says so for every batch and length (`fxq.shapes`), and nobody else reads the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import bypass, call, erase_unused
from fxq.ops.attention import qattention, qattention_float
from fxq.pipeline import Context, Numbers
from fxq.shapes import Shape, shapes
from fxq.spelling import GETITEM
from fxq.stages import Stage

_JOINS = (torch.reshape, torch.flatten)
_OPERANDS = {qattention: 12, qattention_float: 11}
"""Before `heads`."""


@dataclass(frozen=True)
class FoldHeads:
    """See the module's docstring."""

    name: str = "fold-heads"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of attentions and sizes rewritten."""
        known = shapes(gm)
        count = sum(_ask_the_root(gm, node, known[node]) for node in list(gm.graph.nodes) if _is_size(node, known))
        known = shapes(gm)
        for node in list(gm.graph.nodes):
            if node.target in _OPERANDS and len(node.args) == _OPERANDS[node.target]:
                count += _fold(gm, node, known)
        return count


def _is_size(node: Node, known: dict[Node, Any]) -> bool:
    return (node.target == "size" and node in known) or isinstance(known.get(node), int)


def _ask_the_root(gm: GraphModule, size: Node, dim: Any) -> bool:
    """Let the readers of a size ask the value that it comes from, once for all, or know the number."""
    if isinstance(dim, int):
        assert dim == size.meta["value"], (size, dim)
        size.replace_all_uses_with(dim)  # type: ignore[arg-type]
        erase_unused(gm, size)
        return True
    root, i = dim
    if isinstance(root.meta["value"], tuple | list):  # of an op of several results: its first
        root = next(user for user in root.users if user.target is GETITEM)
    if size.args == (root, i) or root is size or "aliases" in root.meta:
        return False
    asked = next((user for user in root.users if user.target == "size" and user.args == (root, i)), None)
    order = list(gm.graph.nodes)
    if asked is None or order.index(asked) > order.index(size):
        with gm.graph.inserting_after(root):
            asked = gm.graph.call_method("size", (root, i))
        asked.meta = dict(size.meta)
    bypass(gm, size, asked)
    return True


def _fold(gm: GraphModule, node: Node, known: dict[Node, Any]) -> bool:
    rows = [_rows_of(operand, known) for operand in node.args[:3]]
    after = _joined(node, known)
    if after is None or any(row is None for row in rows):
        return False
    last = after[-1]
    heads = node.meta["value"].shape[1]
    with gm.graph.inserting_before(last):
        operands = (*rows, *node.args[3:], heads)
        folded = call(gm, node.target, operands, node, node.meta.get("qparams"))
    folded.meta |= {key: last.meta[key] for key in ("source", "value") if key in last.meta}
    known[folded] = known[last]
    bypass(gm, last, folded)
    return True


def _rows_of(operand: Any, known: dict[Node, Any]) -> Node | None:
    """x of reshape(x, (b, t, H, D)).transpose(1, 2), where b and t are those of x."""
    if not isinstance(operand, Node) or not _swaps(operand):
        return None
    split = operand.args[0]
    if not isinstance(split, Node) or split.target is not torch.reshape:
        return None
    x = split.args[0]
    assert isinstance(x, Node)
    found = known[x] if "aliases" not in x.meta else ()
    return x if len(found) == 3 and _is_split(found, known[split]) else None


def _is_split(rows: Shape, heads: Shape) -> bool:
    """Whether [b, t, H * D] has become [b, t, H, D]."""
    if len(heads) != 4 or rows[:2] != heads[:2]:
        return False
    width, count, depth = rows[2], *heads[2:]
    return isinstance(width, int) and isinstance(count, int) and isinstance(depth, int) and count * depth == width > 0


def _swaps(node: Node) -> bool:
    """Whether `node` is transpose(x, 1, 2) of four dimensions."""
    return node.target is torch.transpose and len(node.meta["value"].shape) == 4 and _dims(node) == {1, 2}


def _dims(node: Node) -> set[int]:
    return {dim % 4 for dim in node.args[1:] if isinstance(dim, int)}


def _joined(node: Node, known: dict[Node, Any]) -> list[Node] | None:
    """What stands behind an attention up to where its heads lie side by side, each read by the next alone."""
    after: list[Node] = []
    at, swapped = node, False
    while len(at.users) == 1:
        at = next(iter(at.users))
        if at.op != "call_function" or "aliases" in at.meta:
            return None
        source = at.args[0]
        assert isinstance(source, Node)
        after.append(at)
        if not swapped and _swaps(at):
            swapped = True
        elif at.target in _JOINS and swapped and len(known[at]) == 3 and _is_split(known[at], known[source]):
            return after
        elif at.target is not torch.reshape or known[at] != known[source]:  # a reshape to the shape that it has
            return None
    return None


PASS = FoldHeads()

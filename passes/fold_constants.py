"""fold_constants: what takes part of a constant becomes a constant of its own, in the memory of the whole.

w[8:16], w.chunk(3)[1]  -> w_part
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import bypass, constant, get_attr, is_call, set_constant
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage

PARTS = frozenset(
    {
        *(operator.getitem, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select),
        *("chunk", "split", "unbind", "narrow", "select"),
    }
)
"""What takes parts of a tensor, as functions and as methods."""


def _part_of_constant(gm: GraphModule, node: Node) -> int:
    """w[8:16] or w.chunk(3)[1] of a constant becomes a constant of its own, in the memory of the whole."""
    part = _part(gm, node)
    if not isinstance(part, Tensor) or node.op == "get_attr":
        return 0
    whole = node
    while whole.op != "get_attr":
        whole = whole.all_input_nodes[0]
    path = set_constant(gm, f"{whole.target}_part", part.detach())
    with gm.graph.inserting_before(node):
        bypass(gm, node, get_attr(gm, path, node))
    return 1


def _part(gm: GraphModule, node: Node) -> Any:
    """The value of a constant, of parts of it, or of one of them; None where `node` is something else."""
    if "aliases" in node.meta:
        return None
    if node.op == "get_attr":
        return constant(gm, node)
    if not is_call(node) or node.target not in PARTS or len(node.all_input_nodes) != 1:
        return None
    whole = _part(gm, node.all_input_nodes[0])
    if whole is None or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return function(whole, *node.args[1:], **node.kwargs)


@dataclass(frozen=True)
class FoldConstants:
    """See the module's docstring."""

    name: str = "fold-constants"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of parts that became constants."""
        return sum(_part_of_constant(gm, node) for node in list(gm.graph.nodes) if not node._erased)


PASS = FoldConstants()

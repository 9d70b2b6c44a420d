"""embedding: rows of an int8 table, each with a scale of its own, as float32.

    y[..., k] = f32(scale[id] * q[id, k])

ids: int32 or int64, any shape; table: int8 [V, K]; scales: float32 [V]; y: float32 [..., K]. A quarter of the memory of
a float32 table. An id outside 0..V-1 raises IndexError, as in torch, whose own kernels look up the rows. NumPy truth:
`fxq.numerics.dequantize_weight` of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.decisions import Reason
from fxq.family import Claim, Refusal
from fxq.graph import constant, get_attr, replace, set_constant
from fxq.pattern import Const, Match, Op
from fxq.qdq import dequantize_weight, expect_dtype


def _qembedding(ids: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    expect_dtype("qembedding", "table", table, torch.int8)
    expect_dtype("qembedding", "scales", scales, torch.float32)
    if scales.shape != table.shape[:1]:
        raise ValueError(f"fxq::qembedding: scales have shape {list(scales.shape)}, the table {list(table.shape)}")
    return F.embedding(ids, table) * F.embedding(ids, scales[:, None])


qembedding = kernels.define(
    "qembedding(Tensor ids, Tensor table, Tensor scales) -> Tensor",
    _qembedding,
    lambda ids, table, scales: table.new_empty(*ids.shape, table.shape[1], dtype=torch.float32),
)

_OPERANDS = Op({dequantize_weight}, Const("table"), Const("scales"), shared=True)
_MAX_NORM = 3  # its place among the operands of F.embedding


@dataclass(frozen=True)
class Embedding:
    """An embedding with a constant float32 table."""

    name: str = "embedding"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A product of its table, in the sense that the table alone becomes integers."""
        if node.op != "call_function" or node.target is not F.embedding or len(node.args) < 2:
            return None
        table, max_norm = node.args[1], (*node.args, *[None] * 5)[_MAX_NORM] or node.kwargs.get("max_norm")
        assert isinstance(table, Node)
        if table.op != "get_attr" or "aliases" in table.meta:
            return Refusal(Reason.DYNAMIC_WEIGHT, f"its table is {table}")
        if max_norm is not None:
            return Refusal(Reason.ALIASED, "max_norm changes the table at each call")
        weight = constant(gm, table)
        if weight.dtype != torch.float32:
            return Refusal(Reason.NOT_FLOAT32, f"its table is {weight.dtype}")
        if not weight.numel() or not bool(torch.isfinite(weight).all()):
            return Refusal(Reason.NO_INTEGER_OP, "its table is empty or not finite")
        return Claim("product", (), table)

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """Nothing to fuse."""
        return False

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """embedding(ids, dequantize_weight(table, scales), ...) -> qembedding(ids, table, scales)."""
        match = _OPERANDS.match(node.args[1]) if node.target is F.embedding else None
        if not isinstance(match, Match):
            return False
        table, scales = match.node("table"), match.node("scales")
        rows = len(constant(gm, table))
        if constant(gm, scales).numel() != rows:
            with gm.graph.inserting_before(node):
                path = set_constant(gm, f"{scales.target}_rows", constant(gm, scales).expand(rows).contiguous())
                scales = get_attr(gm, path, scales)
        replace(gm, node, qembedding, (node.args[0], table, scales))
        return True


FAMILY = Embedding()

"""embedding: rows of int8 tables, each with a scale of its own, as float32; added up and normalised where a model does.

    qembedding         y[..., k] = f32(scale[id] * q[id, k])                                      -> float32
    qembedding_norm    x = y of the first table + y of the second + ..., each addition rounded once
                       norm(x), quantize(norm(x) [* factor], scale, zero_point)                   -> float32, uint8

ids: int32 or int64, any shape, several of them shapes that broadcast together; table: int8 [V, K]; scales: float32 [V];
y: float32 [..., K]; kind, weight, bias, eps as in `fxq.ops.norm`. A quarter of the memory of a float32 table. An id
outside 0..V-1 raises IndexError, as in torch. NumPy truth: `fxq.numerics.embed`, `qembedding_norm`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import constant, get_attr, is_finite, replace, set_constant
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


def _qembedding_norm(
    ids: list[Tensor],
    tables: list[Tensor],
    scales: list[Tensor],
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    counts = len(ids), len(tables), len(scales)
    if not ids or len(set(counts)) != 1:
        raise ValueError("fxq::qembedding_norm: {} ids, {} tables, {} scales, expected as many".format(*counts))
    x = functools.reduce(torch.add, map(_qembedding, ids, tables, scales))
    operands = kind, weight, bias, eps, scale, zero_point, factor
    y, q = kernels.portable("norm_and_quantize")(x, *operands)
    return y, q


def _both(ids: list[Tensor], tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(*(index.shape for index in ids))  # type: ignore[no-untyped-call]
    y = tables[0].new_empty(*shape, tables[0].shape[1], dtype=torch.float32)
    return y, torch.empty_like(y, dtype=torch.uint8)


qembedding_norm = kernels.define(
    "qembedding_norm(Tensor[] ids, Tensor[] tables, Tensor[] scales, str kind, Tensor? weight, Tensor? bias, "
    "float eps, float scale, int zero_point, Tensor? factor=None) -> (Tensor, Tensor)",
    _qembedding_norm,
    lambda ids, tables, *rest: _both(ids, tables),
)

_OPERANDS = Op({dequantize_weight}, Const("table"), Const("scales"), shared=True)
_MAX_NORM = 3  # its place among the operands of F.embedding


@dataclass(frozen=True)
class Embedding(Family):
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
        if not weight.numel() or not is_finite(weight):
            return Refusal(Reason.NO_INTEGER_OP, "its table is empty or not finite")
        return Claim("product", (), table)

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

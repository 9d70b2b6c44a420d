"""The stages of a graph, each a set of legal operations, checked between passes.

FLOAT      the model as it was traced: no fxq operation
OBSERVED   the same with observers on the values that will be integers
QDQ        quantize/dequantize pairs in their place; integers only inside pairs and through moves
INTEGER    integer operations that hand each other uint8; no weight is dequantized any more
"""

from __future__ import annotations

import enum

import torch
from torch.fx import GraphModule, Node

from fxq import qdq
from fxq.graph import Value, is_call, submodule, target_name
from fxq.observers import Observer, Rows, WeightObserver
from fxq.spelling import CAT, CLAMP, GETITEM, MAX_POOLS, MOVES, SPLITS


class Stage(enum.Enum):
    """Where a graph stands on the way from float to integer."""

    FLOAT = "FLOAT"
    OBSERVED = "OBSERVED"
    QDQ = "QDQ"
    INTEGER = "INTEGER"


_ONLY_BEFORE_LOWERING = frozenset({qdq.quantize_weight, qdq.dequantize_weight, qdq.fake_quantize_rows})
_PAIRS = _ONLY_BEFORE_LOWERING | {qdq.quantize, qdq.dequantize}
_CARRIERS = MOVES | MAX_POOLS | SPLITS | CAT | {CLAMP, GETITEM}
"""Torch functions that may read quantized uint8."""


def is_integer_op(node: Node) -> bool:
    """Whether `node` calls an op of the `fxq` library, or of a user's own op family."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")


def illegal(gm: GraphModule, node: Node, stage: Stage) -> str | None:
    """Why `node` may not stand in a graph of `stage`; None where it may."""
    if node.op == "call_module":
        observer = isinstance(submodule(gm, node), Observer | Rows | WeightObserver)
        return "an observer outlives calibration" if observer and stage is not Stage.OBSERVED else None
    if not is_integer_op(node):
        return None
    name = target_name(node.target)
    if stage in (Stage.FLOAT, Stage.OBSERVED):
        return f"{name} in a float graph"
    if stage is Stage.QDQ and node.target not in _PAIRS:
        return f"{name} before lowering"
    if stage is Stage.INTEGER and node.target in _ONLY_BEFORE_LOWERING:
        return f"{name} was not lowered"
    return None


def quantized_nodes(gm: GraphModule) -> set[Node]:
    """The nodes whose value is quantized uint8: from integer ops, and from moves of those."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("value")
        uint8 = isinstance(value, Value) and value.dtype == torch.uint8
        tuple_of = isinstance(value, tuple | list)
        if is_integer_op(node):
            if uint8 or tuple_of:
                found.add(node)
        elif node.op == "call_function" and (uint8 or tuple_of) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def verify(gm: GraphModule, stage: Stage) -> tuple[Node, str] | None:
    """The first node that breaks the laws of `stage`, with the reason; None where the graph is legal.

    Values (`fxq.graph.propagate`) must be up to date.
    """
    quantized = quantized_nodes(gm)
    for node in gm.graph.nodes:
        if node in quantized and isinstance(node.meta["value"], Value) and "qparams" not in node.meta:
            return node, "its integers have no scale and zero point (meta 'qparams')"
        if is_call(node):
            reason = illegal(gm, node, stage)
            if reason is not None:
                return node, reason
            if not is_integer_op(node) and node.target not in _CARRIERS:
                for operand in node.all_input_nodes:
                    if operand in quantized and not _reads_shape_only(node):
                        return node, f"it reads the integers of %{operand.name} as if they were real numbers"
    return None


def _reads_shape_only(node: Node) -> bool:
    """Whether `node` asks a tensor for its size and the like, not for its numbers."""
    return not isinstance(node.meta.get("value"), Value)

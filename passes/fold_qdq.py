"""fold_qdq: quantize/dequantize pairs cancel, integers flow through moves, constant weights become int8.

quantize(dequantize(q, s, z), s, z)              ->  q
quantize(move(dequantize(q, s, z)), s, z)        ->  move(q)                     reshape, cat, max-pool, ...
quantize(cat(dequantize(q, s', z'), ...), s, z)  ->  cat(quantize(dequantize(q, s', z'), s, z), ...)
quantize(pad(dequantize(q, s, z), ..., 0), s, z) ->  pad(q, ..., z)              the zero point stands for 0.0
split(dequantize(q, s, z))[i]                    ->  dequantize(split(q)[i], s, z)         len(split) as it was
quantize_weight(constant, scales)                ->  an int8 constant, one for all calls that share the weight
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from fxq.graph import bypass, call, constant, erase_unused, get_attr, is_float_tensor, is_size, set_constant
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, quantize, quantize_weight
from fxq.spelling import CAT, GETITEM, MAX_POOLS, MOVES, PAD, SPLITS, is_move
from fxq.stages import Stage

QParamArgs = tuple[Argument, ...]
Memory = tuple[int, tuple[int, ...], tuple[int, ...], bytes]
"""Where a weight lies, how it is read, and its scales."""


@dataclass(frozen=True)
class FoldQdq:
    """See the module's docstring."""

    name: str = "fold-qdq"
    takes: Stage = Stage.QDQ
    gives: Stage = Stage.QDQ
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order: what a fold turns into integers is there for the next one."""
        count = 0
        weights: dict[Memory, str] = {}
        for node in list(gm.graph.nodes):
            if node._erased:
                continue
            if node.target is quantize:
                count += _cancel(gm, node) or _carry(gm, node)
            elif node.target in SPLITS:
                count += _carry_split(gm, node)
            elif node.target is quantize_weight:
                count += _bake(gm, node, weights)
        return count


def _dequantized(node: object) -> tuple[Node, QParamArgs] | None:
    """The integers behind a dequantize, and its parameters."""
    if isinstance(node, Node) and node.target is dequantize:
        q = node.args[0]
        assert isinstance(q, Node)
        return q, node.args[1:]
    return None


def _cancel(gm: GraphModule, node: Node) -> int:
    source = _dequantized(node.args[0])
    if source is None or source[1] != node.args[1:]:
        return 0
    bypass(gm, node, source[0])
    return 1


def _carry(gm: GraphModule, node: Node) -> int:
    """Move `quantize` from behind a move to nowhere, where all that the move reads is dequantized alike."""
    move = node.args[0]
    if not isinstance(move, Node) or len(move.users) != 1 or move.target not in MOVES | MAX_POOLS | CAT | {GETITEM}:
        return 0
    if not is_move(move):
        return 0
    numbers = [n for n in move.all_input_nodes if is_float_tensor(n)]
    sources = {n: _dequantized(n) for n in numbers}
    others = [n for n, source in sources.items() if source is None or source[1] != node.args[1:]]
    if not numbers or (others and (move.target not in CAT or any(sources[n] is None for n in others))):
        return 0
    for other in others:
        with gm.graph.inserting_before(node):
            sources[other] = call(gm, quantize, (other, *node.args[1:]), other, node.meta["qparams"]), node.args[1:]

    def integers(n: Node) -> Node:
        source = sources.get(n)
        return n if source is None else source[0]

    args = map_arg(move.args, integers)
    if move.target is PAD and args[2] == "constant":
        args = (*args[:3], node.args[2])
    with gm.graph.inserting_before(node):
        moved = call(gm, _function(move), args, node, node.meta["qparams"])
    bypass(gm, node, moved)
    return 1


def _carry_split(gm: GraphModule, node: Node) -> int:
    source = _dequantized(node.args[0])
    pieces = [user for user in node.users if not is_size(user)]
    if source is None or any(piece.target is not GETITEM for piece in pieces):
        return 0
    q, qparams = source
    with gm.graph.inserting_before(node):
        split = call(gm, _function(node), (q, *node.args[1:]), node)
    node.replace_all_uses_with(split, delete_user_cb=is_size)
    if not pieces:
        erase_unused(gm, node)
    for piece in pieces:
        with gm.graph.inserting_before(piece):
            part = call(gm, GETITEM, (split, piece.args[1]), piece, q.meta["qparams"])
            bypass(gm, piece, call(gm, dequantize, (part, *qparams), piece, dtype=torch.float32))
    return 1


def _function(node: Node) -> Callable[..., Any]:
    assert node.op == "call_function" and not node.kwargs and callable(node.target)
    return node.target


def _bake(gm: GraphModule, node: Node, weights: dict[Memory, str]) -> int:
    w, scales = node.args
    assert isinstance(w, Node) and isinstance(scales, Node)
    tensor, s_w = constant(gm, w), constant(gm, scales)
    key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), s_w.numpy().tobytes()
    if key not in weights:
        weights[key] = set_constant(gm, f"{w.target}_int8", quantize_weight(tensor.detach(), s_w))
    with gm.graph.inserting_before(node):
        bypass(gm, node, get_attr(gm, weights[key], node))
    return 1


PASS = FoldQdq()

"""rewrite_einsum: an einsum that is a linear becomes a product of matrices, which normalize_linears writes as a linear.

    einsum('bi,oi->bo', x, w), einsum('...i,oi->...o', x, w)  -> x @ w.t()
    einsum('btc,cd->btd', x, w)                               -> x @ w

w is a constant matrix; the summed index is the last one of x, and the new one takes its place. Einsum batches the
product otherwise than a matmul, so the last bits of a sum may differ.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, call, replace
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage


@dataclass(frozen=True)
class RewriteEinsum:
    """See the module's docstring."""

    name: str = "rewrite-einsum"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of einsums rewritten."""
        return sum(_rewrite(gm, node) for node in list(gm.graph.nodes) if node.target is torch.einsum)


def _rewrite(gm: GraphModule, node: Node) -> bool:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if len(operands) != 2 or not isinstance(equation, str):
        return False
    terms, _, result = equation.replace(" ", "").partition("->")
    first, second = terms.split(",")
    (x, w), (of_x, of_w) = operands, (first, second)
    if _is_constant(x):
        (x, w), (of_x, of_w) = (w, x), (of_w, of_x)
    if not isinstance(w, Node) or not _is_constant(w):
        return False
    transposed = _is_linear(of_x, of_w[::-1], result)
    if not transposed and not _is_linear(of_x, of_w, result):
        return False
    if transposed:
        w = _transpose(gm, w, node)
    replace(gm, node, operator.matmul, (x, w))
    return True


def _is_linear(of_x: str, of_w: str, result: str) -> bool:
    """Whether `of_x,of_w->result` is x @ w: '...i,io->...o' with any letters before the last."""
    if len(of_w) != 2 or not of_w.isalpha() or not of_x or not result:
        return False
    inner, outer = of_w[0], of_w[1]
    letters = of_x.replace("...", "")
    return (
        inner != outer
        and len(set(letters)) == len(letters)
        and of_x.endswith(inner)
        and outer not in of_x
        and result == of_x[:-1] + outer
    )


def _is_constant(value: Any) -> bool:
    """Whether a node is computed from parameters and buffers alone."""
    if not isinstance(value, Node):
        return False
    inputs = value.all_input_nodes
    return value.op == "get_attr" or (value.op != "placeholder" and bool(inputs) and all(map(_is_constant, inputs)))


def _transpose(gm: GraphModule, w: Node, node: Node) -> Node:
    with gm.graph.inserting_before(node):
        flipped = call(gm, torch.transpose, (w, 0, 1), node)
    value: Value = w.meta["value"]
    flipped.meta["value"] = Value(value.dtype, value.shape[::-1])
    return flipped


PASS = RewriteEinsum()

"""rewrite_products: products with one constant matrix that are a linear in other words.

    w @ x                                    -> (x.transpose(-2, -1) @ w.t()).transpose(-2, -1)      x: [..., K, M]
    w @ v, mv(w, v)                          -> v @ w.t()                                            v: [K]
    bmm(x, w.expand(b, -1, -1)), x @ w[None] -> x @ w
    inner(x, w)                              -> x @ w.t()
    baddbmm(c, x, w.expand(b, -1, -1))       -> x @ w + c

w is a constant matrix [N, K], or [K, N] on the right. The product runs over the same numbers in another order, so the
last bits may differ.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, call, constant, get_attr, is_float_tensor, replace, set_constant
from fxq.pipeline import Context, Numbers
from fxq.rewriting import rank, swaps_matrix
from fxq.spelling import ADD
from fxq.stages import Stage

PRODUCTS = frozenset({operator.matmul, *("matmul", "mm", "bmm", "__matmul__"), torch.matmul, torch.mm, torch.bmm})
VECTORS = frozenset({torch.mv, "mv"})
INNER = frozenset({torch.inner, "inner"})
SUMS = frozenset({torch.baddbmm, "baddbmm"})
SPELLINGS = PRODUCTS | VECTORS | INNER | SUMS


@dataclass(frozen=True)
class RewriteProducts:
    """See the module's docstring."""

    name: str = "rewrite-products"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of products rewritten."""
        return sum(
            _rewrite(gm, node) for node in list(gm.graph.nodes) if node.target in PRODUCTS | VECTORS | INNER | SUMS
        )


def _rewrite(gm: GraphModule, node: Node) -> bool:
    addend, first, second = _operands(node)
    if not is_float_tensor(first) or not is_float_tensor(second) or "aliases" in node.meta:
        return False
    if node.target in INNER:
        return _is_matrix(second) and not _is_matrix(first) and _turn_right(gm, node, first, second)
    if addend is None and _is_matrix(first) and not _is_matrix(second):
        return _turn(gm, node, first, second)
    return _unite(gm, node, addend, first, second)


def _operands(node: Node) -> tuple[Any, Any, Any]:
    """(c, a, b) of a @ b + c; Nones where the call has another form."""
    named = dict(node.kwargs)
    names: tuple[str, ...] = ("input", "batch1", "batch2")
    if node.target not in SUMS:
        names = ("input", next((name for name in ("mat2", "vec") if name in named), "other"))
    values = [*node.args, *(named.pop(name) for name in names[len(node.args) :] if name in named)]
    if named or len(values) != len(names):
        return None, None, None
    return values[0] if len(values) == 3 else None, values[-2], values[-1]


def _turn(gm: GraphModule, node: Node, w: Node, x: Node) -> bool:
    """w @ x as a linear of the transposed x."""
    with gm.graph.inserting_before(node):
        turned = _transpose(gm, w, node)
        if rank(x) > 1:
            product = call(gm, operator.matmul, (_transpose(gm, x, node), turned), node)
            product.meta["value"] = _swapped(node)
    if rank(x) == 1:
        replace(gm, node, operator.matmul, (x, turned))
    else:
        replace(gm, node, torch.transpose, (product, -2, -1))
    return True


def _turn_right(gm: GraphModule, node: Node, x: Node, w: Node) -> bool:
    """inner(x, w) as x @ w.t()."""
    with gm.graph.inserting_before(node):
        turned = _transpose(gm, w, node)
    replace(gm, node, operator.matmul, (x, turned))
    return True


def _unite(gm: GraphModule, node: Node, addend: Node | None, x: Node, w: Node) -> bool:
    """x @ w + addend where w is one matrix, repeated or of one batch."""
    source = w.args[0] if w.target == "expand" and "aliases" not in w.meta else w
    if not isinstance(source, Node) or not _is_constant(source) or rank(w) < 3 or rank(x) < rank(w):
        return False
    matrix = constant(gm, source).detach()
    while matrix.dim() > 2 and len(matrix) == 1:
        matrix = matrix[0]
    if matrix.dim() != 2 or w.meta["value"].shape[-2:] != matrix.shape:
        return False
    path = str(source.target) if rank(source) == 2 else set_constant(gm, f"{source.target}_matrix", matrix)
    with gm.graph.inserting_before(node):
        operands = x, get_attr(gm, path, node)
        if addend is not None:
            product = call(gm, operator.matmul, operands, node)
    if addend is None:
        replace(gm, node, operator.matmul, operands)
    else:
        replace(gm, node, ADD, (product, addend))
    return True


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr" and "aliases" not in node.meta


def _is_matrix(node: Node) -> bool:
    """Whether `node` is a constant matrix or the transposition of one."""
    source = node.args[0] if swaps_matrix(node) else node
    return isinstance(source, Node) and _is_constant(source) and rank(source) == 2


def _transpose(gm: GraphModule, x: Node, like: Node) -> Node:
    """x with its last two dimensions swapped; what is the transposition of a matrix already is that matrix."""
    if swaps_matrix(x) and isinstance(x.args[0], Node):
        return x.args[0]
    turned = call(gm, torch.transpose, (x, -2, -1), like)
    turned.meta["value"] = _swapped(x)
    return turned


def _swapped(node: Node) -> Value:
    value: Value = node.meta["value"]
    return Value(value.dtype, (*value.shape[:-2], value.shape[-1], value.shape[-2]))


PASS = RewriteProducts()

"""rewrite_einsum: an einsum that is a linear becomes a product of matrices, which normalize_linears writes as a linear.

    einsum('bi,oi->bo', x, w), einsum('...i,oi->...o', x, w)  -> x @ w.t()
    einsum('btc,cd->btd', x, w)                               -> x @ w
    einsum('btc,chd->bthd', x, w)    -> reshape(x @ reshape(w, (c, h * d)), (b, t, h, d))
    einsum('bthd,chd->btc', x, w)    -> reshape(x, (b, t, h * d)) @ reshape(w, (c, h * d)).t()

w is a constant; the summed indices are the last ones of x, and the new ones take their place. Einsum batches the
product otherwise than a matmul, so the last bits of a sum may differ.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, call, constant, get_attr, is_float_tensor, replace, set_constant
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
    if not isinstance(w, Node) or not _is_constant(w) or not is_float_tensor(x):
        return False
    letters = _letters(of_x, of_w, result)
    if letters is None:
        return False
    summed, made = letters
    transposed = of_w != summed + made
    if len(of_w) > 2:
        matrix = _matrix(gm, w, len(made if transposed else summed), node)
        if matrix is None:
            return False
        assert isinstance(x, Node)
        with gm.graph.inserting_before(node):
            rows = [_size(gm, x, i, node) for i in range(len(x.meta["value"].shape) - len(summed))]
            x = x if len(summed) == 1 else _reshape(gm, x, (*rows, math.prod(x.meta["value"].shape[len(rows) :])), node)
        width = w.meta["value"].shape[: len(made)] if transposed else w.meta["value"].shape[len(summed) :]
        w = _transpose(gm, matrix, node) if transposed else matrix
        if len(made) > 1:
            with gm.graph.inserting_before(node):
                product = call(gm, operator.matmul, (x, w), node)
            product.meta["value"] = Value(torch.float32, (*x.meta["value"].shape[:-1], math.prod(width)))
            replace(gm, node, torch.reshape, (product, (*rows, *width)))
            return True
    elif transposed:
        w = _transpose(gm, w, node)
    replace(gm, node, operator.matmul, (x, w))
    return True


def _letters(of_x: str, of_w: str, result: str) -> tuple[str, str] | None:
    """The summed and the new letters of '...s,sn->...n' or '...s,ns->...n', each one or more; None where it is not."""
    letters = of_x.replace("...", "")
    if not of_w.isalpha() or not result or len({*letters}) != len(letters) or len({*of_w}) != len(of_w):
        return None
    for i in range(1, len(of_w)):
        for summed, made in ((of_w[:i], of_w[i:]), (of_w[i:], of_w[:i])):
            is_linear = of_x.endswith(summed) and result == of_x.removesuffix(summed) + made
            if is_linear and not set(made).intersection(of_x):
                return summed, made
    return None


def _matrix(gm: GraphModule, w: Node, first: int, node: Node) -> Node | None:
    """A constant as a matrix on the same memory, its `first` dimensions joined, and the others; None where it is none.

    Training finds the parameter by the memory.
    """
    if w.op != "get_attr" or "aliases" in w.meta or w.meta["value"].dtype != torch.float32:
        return None
    tensor = constant(gm, w).detach()
    joined = tensor.reshape(math.prod(tensor.shape[:first]), -1)
    owner, _, name = f"{w.target}_matrix".rpartition(".")
    known = getattr(gm.get_submodule(owner), name, None)
    same = isinstance(known, torch.Tensor) and known.data_ptr() == joined.data_ptr() and known.shape == joined.shape
    path = f"{w.target}_matrix" if same else set_constant(gm, f"{w.target}_matrix", joined)
    with gm.graph.inserting_before(node):
        return get_attr(gm, path, node)


def _size(gm: GraphModule, x: Node, dim: int, node: Node) -> Node:
    size = gm.graph.call_method("size", (x, dim))
    size.meta |= {"origin": node.meta.get("origin"), "value": x.meta["value"].shape[dim]}
    return size


def _reshape(gm: GraphModule, x: Node, sizes: tuple[Any, ...], node: Node) -> Node:
    made = call(gm, torch.reshape, (x, sizes), node)
    made.meta["value"] = Value(x.meta["value"].dtype, (*x.meta["value"].shape[: len(sizes) - 1], sizes[-1]))
    return made


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

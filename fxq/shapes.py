"""Shapes as a graph computes them: each dimension a number, or a dimension of the value that it comes from."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, target_name
from fxq.spelling import GETITEM

Dim = int | tuple[Node, int]
"""A number, or dimension i of what a node had."""
Shape = tuple[Dim, ...]

_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv})
_LIKE_FIRST = frozenset(
    {"norm", "norm_quantize", "norm_and_quantize", "quantize", "quantize_scaled", "dequantize", "requantize", "lookup"}
)
_LINEARS: dict[str, int | None] = {"qlinear": None, "qlinear_act_quantize": None, "qlinears": None}
_LINEARS |= {
    "qchain": None,
    "qchain_float": None,
    "qlinear_float": 4,
    "qlinear_act": 5,
    "qlinear_dynamic": 5,
    "qfeed_forward": 9,
}
"""Where the addend is, whose rows may be more than those of x."""


def shapes(gm: GraphModule) -> dict[Node, Any]:
    """For each node of a tensor its `Shape`, of several a list of them, of a size a `Dim`."""
    free = _infer(gm, {})
    fixed = {
        free[x][-1]: x.meta["value"].shape[-1]
        for node in gm.graph.nodes
        if _name(node) in _LINEARS and (x := node.args[0]) in free
    }
    return _infer(gm, fixed)


def _infer(gm: GraphModule, fixed: Mapping[Dim, int]) -> dict[Node, Any]:
    """fixed: dimensions that a linear's weight decides; with any other size the call fails."""
    known: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("value")
        if isinstance(value, Value):
            found = _tensor(node, known)
            known[node] = tuple(fixed.get(dim, dim) for dim in (_own(node) if found is None else found))
            assert len(known[node]) == len(value.shape), node
        elif isinstance(value, tuple | list):
            known[node] = _several(node, known)
        elif isinstance(value, int) and node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            x, dim = node.args
            known[node] = known[x][dim] if x in known and isinstance(dim, int) else (node, 0)
        elif isinstance(value, int) and node.target in _ARITHMETIC:
            operands = [known.get(arg) if isinstance(arg, Node) else arg for arg in node.args]
            if all(type(operand) is int for operand in operands):
                known[node] = value
    return known


def _own(node: Node) -> Shape:
    """Nothing is known of the shape; of a constant, all."""
    shape = node.meta["value"].shape
    return tuple(shape) if node.op == "get_attr" else tuple((node, i) for i in range(len(shape)))


def _name(node: Node) -> str:
    return target_name(node.target).removeprefix("fxq.") if node.op == "call_function" else ""


def _tensor(node: Node, known: dict[Node, Any]) -> Shape | None:
    name, args = _name(node), node.args
    x: Any = known.get(args[0]) if args and isinstance(args[0], Node) else None
    if x is None:
        return None
    if node.target is GETITEM:
        return x[args[1]] if isinstance(x, list) and isinstance(args[1], int) else None
    if name in _LIKE_FIRST:
        return x  # type: ignore[no-any-return]
    if name in _LINEARS:
        return _rows(node, x, known)
    if name in ("qattention", "qattention_float"):
        v = known[args[2]]  # type: ignore[index]
        heads_at = 12 if name == "qattention" else 11
        if len(args) > heads_at and args[heads_at]:
            return (*x[:-1], node.meta["value"].shape[-1])
        return (*x[:-1], v[-1])
    if node.target is torch.transpose and x:
        a, b = args[1:]
        order = list(x)
        order[a], order[b] = order[b], order[a]  # type: ignore[index]
        return tuple(order)
    if node.target is torch.reshape:
        return _reshaped(x, [_size(n, known) for n in args[1]])  # type: ignore[union-attr]
    if node.target is torch.flatten and x:
        first, last = (dim % len(x) for dim in (*args[1:], -1)[:2])  # type: ignore[operator]
        joined = _reshaped(x[first : last + 1], [-1]) if len(args) > 1 else None
        return None if joined is None else (*x[:first], *joined, *x[last + 1 :])
    return None


def _size(size: Any, known: dict[Node, Any]) -> Any:
    """A size given to an operation; one that is a tensor is not known."""
    return (known.get(size) if isinstance(size.meta["value"], int) else None) if isinstance(size, Node) else size


def _rows(node: Node, x: Shape, known: dict[Node, Any]) -> Shape | None:
    place = _LINEARS[_name(node)]
    addend = node.args[place] if place is not None and len(node.args) > place else None
    if addend is not None and known[addend][:-1] not in ((), x[:-1]):  # type: ignore[index]
        return None
    return (*x[:-1], node.meta["value"].shape[-1])


def _several(node: Node, known: dict[Node, Any]) -> Any:
    name, values = _name(node), node.meta["value"]
    x = known.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if name == "qlinears" and x is not None:
        return [(*x[:-1], value.shape[-1]) for value in values]
    if name == "norm_and_quantize" and x is not None:
        return [x, x]
    if name == "qembedding_norm":
        width = values[0].shape[-1]
        return [(*((node, i) for i in range(len(values[0].shape) - 1)), width)] * 2
    return None


def _reshaped(x: Shape, sizes: list[Any]) -> Shape | None:
    """The sizes of a reshape, the one that is -1 found from what the others leave of x."""
    if any(size is None for size in sizes):
        return None
    if -1 not in sizes:
        return tuple(sizes)
    left = Counter(dim for dim in x if not isinstance(dim, int))
    left.subtract(size for size in sizes if not isinstance(size, int))
    number = math.prod(dim for dim in x if isinstance(dim, int))
    given = math.prod(size for size in sizes if isinstance(size, int) and size != -1)
    rest = list(left.elements())
    if any(count < 0 for count in left.values()) or not given or number % given or len(rest) > 1:
        return None
    if rest and number != given:
        return None
    return tuple((rest[0] if rest else number // given) if size == -1 else size for size in sizes)

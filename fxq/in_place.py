"""Which operations of a graph are methods of a tensor, and which of them compute in the memory of their first operand.

    torch.add(t, y)       -> add, where t is a tensor at every call and not only on the examples
    torch.add(t, y)       -> add_, where besides nobody else reads t, and the result fits into its memory

A graph works out of place, as a compiler wants it; a model does not always, and new memory for a result of 100 000
values takes as long as computing them.
"""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxq.graph import is_float_tensor
from fxq.spelling import BATCH_NORM, CONVS, LINEAR

_NAMES = (
    *("add", "ceil", "clamp", "cos", "div", "erf", "exp", "expm1", "floor", "log", "log1p", "mul", "neg", "pow"),
    *("reciprocal", "relu", "round", "rsqrt", "sigmoid", "sin", "sqrt", "square", "sub", "tanh"),
)
_POINTWISE: dict[object, str] = {getattr(torch, name): name for name in _NAMES}
_POINTWISE |= {getattr(operator, name): name for name in ("add", "mul", "neg", "pow", "sub")} | {
    operator.truediv: "div"
}
"""What a method of a tensor `name` computes too, and `name_` in the memory of its first operand."""
_PRODUCTS = frozenset({LINEAR, BATCH_NORM, torch.matmul, torch.bmm, *CONVS})
"""Other functions whose result is a tensor of its own."""


def method_of(node: Node) -> str | None:
    """The method of its first operand that computes `node`; None where it stays as the graph has it."""
    name = _pointwise(node)
    if name is None or node.kwargs or not _is_tensor(node.args[0]):
        return None
    if not all(isinstance(arg, Node) or arg is None or type(arg) in (int, float) for arg in node.args):
        return None
    return f"{name}_" if _fits(node) else name


def _pointwise(node: object) -> str | None:
    if not is_float_tensor(node) or not isinstance(node, Node):
        return None
    if node.op == "call_method":
        return str(node.target) if node.target in _NAMES else None
    return _POINTWISE.get(node.target) if node.op == "call_function" else None


def _is_tensor(value: object) -> bool:
    """Whether `value` is a tensor at every call: an input may be a number at another one."""
    return isinstance(value, Node) and (value.op == "get_attr" or _is_own(value))


def _is_own(node: Node) -> bool:
    """Whether `node` is a tensor at every call, in memory that is new."""
    if not is_float_tensor(node) or "out" in node.kwargs:
        return False
    target = node.target
    if _pointwise(node) is not None and (node.op == "call_method" or getattr(target, "__module__", "") == "_operator"):
        return _is_tensor(node.args[0])
    return target in _POINTWISE or target in _PRODUCTS or _is_integer_op(node)


def _fits(node: Node) -> bool:
    """Whether `node` can be computed in the memory of its first operand, whatever the sizes and dtypes of a call."""
    first, *others = node.args
    assert isinstance(first, Node)
    if not _is_own(first) or len(first.users) > 1:
        return False
    inside = {first} | _inside(first)
    typed = any(map(_is_typed, inside))
    return all(not isinstance(arg, Node) or arg in inside or (typed and _is_number(arg)) for arg in others)


def _is_number(node: Node) -> bool:
    """Whether `node` is a constant without dimensions."""
    return node.op == "get_attr" and is_float_tensor(node) and not node.meta["value"].shape


def _is_typed(node: Node) -> bool:
    """Whether `node` is float32 at every call, or has dimensions: the dtype of a constant without any changes nothing.

    What is made of integers is the one, what comes out of a linear or a norm the other.
    """
    return _is_integer_op(node) or (node.op == "get_attr" and is_float_tensor(node))


def _is_integer_op(node: Node) -> bool:
    """Whether `node` calls an op of fxq's own: its results are in new memory."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "fxq"


def _inside(node: Node) -> set[Node]:
    """The values that a pointwise result is made of: it has their dtype, or a wider one, and room for their sizes."""
    found: set[Node] = set()
    for operand in node.all_input_nodes if _pointwise(node) is not None else ():
        found |= {operand} | _inside(operand)
    return found

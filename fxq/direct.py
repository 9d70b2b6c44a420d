"""The code that runs a graph, with the shortest way that Python has to each of its calls; the numbers are the same.

    torch.add(x, y)       -> the function itself, looked up once
    torch.add(t, y)       -> t.add(y), where t is a tensor at every call and not only on the examples
    torch.add(t, y)       -> t.add_(y), where besides nobody else reads t, and the result fits into its memory

A graph works out of place, as a compiler wants it; a model does not always, and new memory for a result of 100 000
values takes as long as computing them. `code`, and whoever follows the graph, sees it as it is.
"""

from __future__ import annotations

import inspect
import operator
import re
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxq.graph import is_float_tensor
from fxq.spelling import BATCH_NORM, CONVS, LINEAR

_LINE = re.compile(r"^    (\w+) = (.*?)(;  .*)?$", re.MULTILINE)
_FUNCTION = re.compile(r"[\w.]+(?=\()")
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


def shorten(source: str, graph: Graph) -> tuple[str, dict[str, Any]]:
    """`source`, the code of `graph`, with the calls written shorter; and what its new names stand for."""
    nodes = {node.name: node for node in graph.nodes if node.op in ("call_function", "call_method")}
    functions: dict[object, str] = {}

    def write(line: re.Match[str]) -> str:
        name, expression, rest = line.groups(default="")
        node = nodes.get(name)
        if node is not None:
            method = _method(node)
            if method is not None:
                first, *others = node.args
                expression = f"{first}.{method}({', '.join(map(str, others))})"
            elif node.op == "call_function" and _FUNCTION.match(expression):
                short = functions.setdefault(node.target, f"_fxq_call_{len(functions)}")
                expression = _FUNCTION.sub(short, expression, count=1)
        return f"    {name} = {expression}{rest}"

    source = _LINE.sub(write, source)
    return source, {name: _callable(function) for function, name in functions.items()}


def _callable(function: Any) -> Any:
    """What `function` calls: an overload one of C++, a function of `fxq.tracing` the one behind a look for proxies."""
    if isinstance(function, OpOverload):
        return function._op
    return inspect.unwrap(function) if function.__module__ == "fxq.tracing" else function


def _method(node: Node) -> str | None:
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
    return target in _POINTWISE or target in _PRODUCTS or (isinstance(target, OpOverload) and target.namespace == "fxq")


def _fits(node: Node) -> bool:
    """Whether `node` can be computed in the memory of its first operand, whatever the sizes of a call."""
    first, *others = node.args
    assert isinstance(first, Node)
    if not _is_own(first) or len(first.users) > 1:
        return False
    inside = {first} | _inside(first)
    return all(not isinstance(arg, Node) or arg in inside or _is_number(arg) for arg in others)


def _is_number(node: Node) -> bool:
    """Whether `node` is a constant without dimensions."""
    return node.op == "get_attr" and is_float_tensor(node) and not node.meta["value"].shape


def _inside(node: Node) -> set[Node]:
    """The values that a pointwise result is made of: it has their dtype, or a wider one, and room for their sizes."""
    found: set[Node] = set()
    for operand in node.all_input_nodes if _pointwise(node) is not None else ():
        found |= {operand} | _inside(operand)
    return found

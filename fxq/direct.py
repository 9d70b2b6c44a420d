"""The code that runs a graph, with the shortest way that Python has to each of its calls; the numbers are the same.

    torch.add(x, y)       -> the function itself, looked up once
    torch.add(t, y)       -> t.add(y), where t is a tensor at every call and not only on the examples
    torch.add(t, y)       -> t.add_(y), where besides nobody else reads t, and the result fits into its memory
    self.fc1.weight       -> self._modules["fc1"]._parameters["weight"], each module and table looked up once

A graph works out of place, as a compiler wants it; a model does not always, and new memory for a result of 100 000
values takes as long as computing them. `code`, and whoever follows the graph, sees it as it is.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

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


class Source:
    """The code of a graph's `forward`: `lines`, and in `scope` what their own names stand for.

    Those names are of no node and no parameter; what is no number, string or container of them has one, so that no text
    of an argument is ever read as code. names: the node of each line, "" where there is none. direct: with methods, in
    place where that fits, and without what only a tracer needs; both would be in the way of torch.compile.
    """

    def __init__(self, gm: GraphModule, *, direct: bool) -> None:
        self.gm, self.direct = gm, direct
        self.scope: dict[str, Any] = {}
        self.held: dict[int, str] = {}
        self.places: dict[str, str] = {}
        parameters = {node: str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
        taken = {*parameters.values(), *(node.name for node in gm.graph.nodes)}
        self.prefix = "_fxq"
        while any(name.startswith(self.prefix) for name in taken):
            self.prefix += "_"
        defaults = ("".join(f"={self._text(default)}" for default in node.args) for node in parameters)
        signature = [f"{name}{default}" for name, default in zip(parameters.values(), defaults, strict=True)]
        self.lines, self.names = [gm.graph._codegen.gen_fn_def(signature, "")], [""]
        renamed = {node: name.lstrip("*") for node, name in parameters.items() if node.name != name}
        if renamed:  # at once: the name of one may be the parameter of another
            self._add("", f"{', '.join(node.name for node in renamed)} = {', '.join(renamed.values())}")
        last = {operand: node for node in gm.graph.nodes for operand in node.all_input_nodes}
        for node in gm.graph.nodes:
            if node.op == "output":
                self._add(node.name, f"return {self._text(node.args[0])}")
            elif node.op != "placeholder":
                unread = [x.name for x in (*node.all_input_nodes, node) if last.get(x, node) is node]
                self._add(node.name, f"{node.name} = {self._expression(node)}", *(f"{name} = None" for name in unread))

    def compile(self, file: str) -> Callable[..., Any]:
        """The function. file: what tracebacks call its file."""
        exec(compile("\n".join(self.lines), file, "exec"), self.scope)
        forward: Callable[..., Any] = self.scope["forward"]
        return forward

    def _add(self, name: str, *statements: str) -> None:
        self.lines.append(f"    {'; '.join(statements)}")
        self.names.append(name)

    def _expression(self, node: Node) -> str:
        if node.op == "get_attr":
            return self._path(str(node.target))
        if node.op == "call_module":
            return self._call(self._path(str(node.target)), node.args, node.kwargs)
        method = _method(node) if self.direct else None
        if method is None and node.op == "call_method":
            method = str(node.target)
        if method is not None:
            return self._call(f"{self._text(node.args[0])}.{method}", node.args[1:], node.kwargs)
        return self._call(self._hold(_callable(node.target) if self.direct else node.target), node.args, node.kwargs)

    def _call(self, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        named = (f"{name}={self._text(value)}" for name, value in kwargs.items())
        return f"{function}({', '.join([*map(self._text, args), *named])})"

    def _text(self, value: Any) -> str:
        """Python text for an argument."""
        if isinstance(value, Node):
            return value.name
        if isinstance(value, tuple | list):
            inside = "".join(f"{self._text(item)}, " for item in value)
            if isinstance(value, list):
                return f"[{inside}]"
            return f"{self._hold(type(value)) if hasattr(value, '_fields') else ''}({inside})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self._text(key)}: {self._text(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice) and any(isinstance(x, Node) for x in (value.start, value.stop, value.step)):
            return self._call(self._hold(slice), (value.start, value.stop, value.step), {})
        plain = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
        return repr(value) if plain else self._hold(value)

    def _hold(self, value: Any) -> str:
        """The name in `scope` of `value`."""
        name = self.held.setdefault(id(value), f"{self.prefix}_{len(self.held)}")
        self.scope[name] = value
        return name

    def _path(self, path: str) -> str:
        """The parameter, buffer, module or other attribute at `path`."""

        def named(place: str, text: str) -> str:
            if place in self.places:
                return self.places[place]
            self.places[place] = f"{self.prefix}_at_{len(self.places)}"
            return f"({self.places[place]} := {text})"

        *parts, name = path.split(".")
        owner, place = "self", ""
        for part in parts:
            modules = named(f"{place}.._modules", f"{owner}._modules")
            place = f"{place}.{part}"
            owner = named(place, f"{modules}[{part!r}]")
        module = self.gm.get_submodule(".".join(parts))
        for table in ("_buffers", "_parameters", "_modules"):
            if name in getattr(module, table):
                return f"{named(f'{place}..{table}', f'{owner}.{table}')}[{name!r}]"
        return f"{self._hold(getattr)}({owner}, {name!r})"


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

"""The code that runs a graph, with the shortest way that Python has to each of its calls; the numbers are the same.

    torch.add(x, y)       -> the function itself, looked up once
    torch.add(t, y)       -> t.add(y) or t.add_(y), where `fxq.in_place` has such a method
    self.fc1.weight       -> self._modules["fc1"]._parameters["weight"], each module and table looked up once

`code`, and whoever follows the graph, sees it as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxq.in_place import method_of


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
        method = method_of(node) if self.direct else None
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

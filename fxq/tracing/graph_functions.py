"""What a traced graph is made of besides torch: its guards, its mutations, how it is printed and unpickled."""

from __future__ import annotations

import builtins
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import fx
from torch.fx.graph import CodeGen

from fxq.errors import GuardError

P = ParamSpec("P")
R = TypeVar("R")

GLOBAL_STATE = threading.RLock()
"""Held while a trace changes anything that other threads can see (functions of modules, flags of torch)."""


class TracingWarning(UserWarning):
    """A traced model will not do something that the user's model does; the graph itself is right."""


def in_graph(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function a node when it meets an fx proxy: unpickling a GraphModule traces its code symbolically."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in args:
            if isinstance(arg, fx.Proxy):
                return cast(R, arg.tracer.create_proxy("call_function", call, args, kwargs))
        return function(*args, **kwargs)

    call.__module__ = "fxq.tracing"
    return call


@in_graph
def guard(value: object, expected: object, message: str) -> None:
    """Raise `GuardError` unless `value == expected`, what the user's code decided on while it was traced."""
    if value is expected:
        return
    if type(value) is bool:  # a branch: torch.compile cannot compare what two sizes that it does not know have decided
        value = True if value else False  # noqa: SIM210
    if not isinstance(value, torch.Tensor) and value == expected:
        return
    raise GuardError(f"{message}; this call has {_describe(value)}; quantize again with examples like this call")


@in_graph
def mutate(tensor: torch.Tensor, method: str, *args: Any, **kwargs: Any) -> None:
    """Call an in-place method for its effect alone: what `tensor.method(*args)` is where nothing uses its result."""
    getattr(tensor, method)(*args, **kwargs)


_SHORT = 16
_is_compiling = torch.compiler.is_dynamo_compiling  # it would warn of a cache


@lru_cache(256)
def _of_types(kind: type, *types: type) -> str | None:
    """`structure` of a tuple or list of what is no container, which its types decide; None for any other."""
    if any(issubclass(part, dict | list | tuple) or is_dataclass(part) for part in types):
        return None
    inside = ", ".join("None" if part is type(None) else "*" for part in types)
    return f"[{inside}]" if kind is list else f"({inside})"


@in_graph
def structure(value: Any) -> str:
    """Containers, their lengths and keys, and which leaves are None, as text; every other leaf is `*`."""
    kind = type(value)
    if (kind is tuple or kind is list) and len(value) <= _SHORT and not _is_compiling():  # this runs in each call
        known = _of_types(kind, *map(type, value))  # type: ignore[arg-type]
        if known is not None:
            return known
    if isinstance(value, torch.Tensor):
        return "*"
    if value is None:
        return "None"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {structure(item)}" for key, item in value.items()) + "}"
    if is_dataclass(value) and not isinstance(value, type):
        items = (f"{field.name}={structure(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({', '.join(items)})"
    if isinstance(value, list | tuple):
        inside = ", ".join([structure(item) for item in value])
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return "*"


@in_graph
def length(value: list[object]) -> int:
    """`len(value)` as a node (a proxy cannot answer `len`)."""
    return len(value)


@in_graph
def whole(number: float) -> int:
    """`int(number)` as a node (a proxy cannot answer `int`)."""
    return int(number)


@in_graph
def rounded(number: float, digits: int | None) -> float:
    """`round(number, digits)` as a node."""
    return round(number, digits)


@in_graph
def power(base: float, exponent: float) -> float:
    """`base ** exponent` as a node (fx writes `-2 ** n` for a constant base)."""
    result: float = base**exponent
    return result


for _function in (guard, mutate):
    fx.node.has_side_effect(_function)


def guards(gm: fx.GraphModule) -> list[str]:
    """What the graph takes for granted, in the order in which it is checked."""
    return [str(node.args[2]) for node in gm.graph.nodes if node.op == "call_function" and node.target is guard]


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


class SignatureCodeGen(CodeGen):
    """Writes `def forward` with the positional-only and keyword-only marks of the user's forward."""

    def __init__(self, positional_only: int, keyword_only: int) -> None:
        """Count the positional-only parameters (from the left) and the keyword-only ones (from the right)."""
        super().__init__()
        self.positional_only, self.keyword_only = positional_only, keyword_only

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """Insert `/` and `*` among the parameters."""
        if self.keyword_only:
            free_vars.insert(len(free_vars) - self.keyword_only, "*")
        if self.positional_only:
            free_vars.insert(self.positional_only + (free_vars[0] == "self"), "/")
        return super().gen_fn_def(free_vars, maybe_return_annotation, **options)


def set_signature(graph: fx.Graph, kinds: list[inspect._ParameterKind]) -> None:
    """Give the graph's code the parameter kinds of its placeholders; the plain code generator is kept where it can."""
    positional_only = kinds.count(inspect.Parameter.POSITIONAL_ONLY)
    keyword_only = kinds.count(inspect.Parameter.KEYWORD_ONLY)
    if positional_only or keyword_only:
        graph.set_codegen(SignatureCodeGen(positional_only, keyword_only))


def name_apart(graph: fx.Graph) -> None:
    """Rename what fx would write over an argument that is yet to be read, or over `self`."""
    arguments = {str(node.target) for node in graph.find_nodes(op="placeholder")}
    for node in graph.nodes:
        while node.name in {"self", *arguments} and not (node.op == "placeholder" and node.name == node.target):
            node._rename(f"{node.name}_")


FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
)  # fmt: skip


class UnpicklingTracer(fx.Tracer):
    """Rebuilds a traced graph from its own code, which is how fx unpickles a GraphModule."""

    # Without it a buffer's method is called on the buffer while unpickling, and not at each call.
    proxy_buffer_attributes = True

    def trace(
        self, root: torch.nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Trace with factory functions that accept proxies as sizes, and keep the signature's kinds."""
        with GLOBAL_STATE, _factories_take_proxies(self):
            graph = super().trace(root, concrete_args)
        if isinstance(root, torch.nn.Module):
            set_signature(graph, [parameter.kind for parameter in inspect.signature(root.forward).parameters.values()])
        name_apart(graph)
        return graph


@contextmanager
def _factories_take_proxies(tracer: fx.Tracer) -> Iterator[None]:
    def recording(factory: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda leaf: found.append(leaf) if isinstance(leaf, fx.Proxy) else None
            )
            return tracer.create_proxy("call_function", factory, args, kwargs) if found else factory(*args, **kwargs)

        return call

    originals = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, factory in originals.items():
            builtins.setattr(torch, name, recording(factory))
        yield
    finally:
        for name, factory in originals.items():
            builtins.setattr(torch, name, factory)

"""Guards that bind nobody: decisions on sizes after which the model computes the same either way.

A library expands one row of positions only where there are more rows of data. Where the model, given another number of
rows, decides otherwise and still calls the same operations on the same values, but for such views, the decision is no
guard. Not where it then decides something that it has not decided before, whose other way nobody has seen; nor two
decisions, which may come out otherwise together where each has only been seen to do so alone.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import FxqError
from fxq.randomness import seed
from fxq.tracing.graph_functions import guard, mutate
from fxq.tracing.questions import BY_SIZE
from fxq.tracing.spelling import RANDOM
from fxq.tracing.values import map_tensors, tensors
from fxq.tracing.verify import Call, Copier, is_same, run

ROWS = (1, 2, 3)
"""How many are tried."""
_VIEWS = frozenset({"expand", "expand_as"})
_IN_PLACE = frozenset({mutate, operator.setitem, *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul"))})


def drop_idle_guards(
    gm: fx.GraphModule, model: nn.Module, call: Call, record: Callable[[Call], fx.Graph], copied: Copier
) -> None:
    """Erase the guards of `gm` that decide nothing on the numbers; record: what the model does on another call."""
    guards = {node.name: node for node in gm.graph.nodes if BY_SIZE in node.meta}
    idle: set[str] = set()
    needed: set[str] = set()
    for other in _other_rows(call) if guards else ():
        asking = _Asking(copied(gm), set(guards))
        result = asking.ask(other)
        if asking.otherwise:
            with suppress(_NotTakenError):
                same = _is_same(gm, model, other, result, record, copied)
                (idle if same else needed).update(asking.otherwise)
    if len(idle) != 1 or idle & needed:
        return
    (dropped,) = (guards[name] for name in idle)
    operand = dropped.args[0]
    gm.graph.erase_node(dropped)
    _erase_unread(gm.graph, operand)
    gm.recompile()


class _NotTakenError(Exception):
    """The model itself does not take so many rows."""


def _is_same(
    gm: fx.GraphModule,
    model: nn.Module,
    call: Call,
    result: Any,
    record: Callable[[Call], fx.Graph],
    copied: Copier,
) -> bool:
    """Whether the graph gives what the model does on a call, and by the very operations."""
    try:
        expected = run(model, call, copied=copied)
    except Exception as error:
        raise _NotTakenError from error
    if not is_same(result, expected):
        return False
    try:
        graph = record(call)
    except FxqError:
        return False
    if not _decided(graph) <= _decided(gm.graph):
        return False
    known: dict[Any, int] = {}
    return _computed(gm.graph, known) == _computed(graph, known)


def _decided(graph: fx.Graph) -> set[str]:
    """What a graph's guards are about, with the lines that decided, whichever way."""
    messages = [str(node.args[2]) for node in graph.nodes if node.target is guard]
    return {message.partition("` is ")[0] for message in messages}


def _other_rows(call: Call) -> Iterator[Call]:
    """The examples cut to, or repeated up to, so many rows, if all their tensors have as many."""
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors(call)}
    if len(rows) == 1 and rows != {0}:
        for n in ROWS:
            if rows != {n}:
                taken = torch.arange(n) % max(rows)
                args, kwargs = map_tensors(call, partial(_rows_of, taken))
                yield args, kwargs


def _rows_of(taken: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()[taken]


class _Asking(fx.Interpreter):
    """Runs a graph past those of its `guards` whose decision comes out otherwise, which it notes."""

    def __init__(self, gm: fx.GraphModule, guards: set[str]) -> None:
        super().__init__(gm)
        self.guards = guards
        self.otherwise: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.guards:
            value, expected, _ = self.fetch_args_kwargs_from_env(n)[0]
            if value != expected:
                self.otherwise.add(n.name)
                return None
        return super().run_node(n)

    def ask(self, call: Call) -> Any:
        """Return what the graph gives; None where it fails."""
        args, kwargs = map_tensors(call, lambda tensor: tensor.clone())
        bound = inspect.signature(self.module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        seed()
        with torch.no_grad(), suppress(Exception):
            return self.run(*bound.arguments.values())
        return None


def _computed(graph: fx.Graph, known: dict[Any, int]) -> list[int]:
    """What a graph returns and changes, each value as the number of the expression that computes it in `known`."""
    numbers: dict[fx.Node, int] = {}
    effects: list[int] = []

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return f"{type(value).__name__}({', '.join(map(text, value))})"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        return repr(value)

    for node in graph.nodes:
        if node.target is guard:
            continue
        if node.op == "call_method" and node.target in _VIEWS:
            numbers[node] = numbers[node.args[0]]
            continue
        name = getattr(node.target, "__name__", str(node.target))
        apart = graph if name.startswith("_tensor_constant") else None  # two graphs may call two tensors so
        turn = len(effects) if name.startswith("rand") or name.rstrip("_") in RANDOM else None
        expression = node.op, node.target, text(node.args), text(node.kwargs), apart, turn
        numbers[node] = known.setdefault(expression, len(known))
        in_place = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if node.op == "output" or in_place or turn is not None or node.kwargs.get("inplace"):
            effects.append(numbers[node])
    return effects


def _erase_unread(graph: fx.Graph, node: Any) -> None:
    if isinstance(node, fx.Node) and not node.users and node.op in ("call_function", "call_method"):
        operands = node.all_input_nodes
        graph.erase_node(node)
        for operand in operands:
            _erase_unread(graph, operand)

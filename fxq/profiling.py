"""Where the time of a call goes: each operation measured in its place, beside what it takes by itself.

*measured* is the median over runs of the whole graph, between its neighbours; *predicted* is the time of the same
operation alone, from `fxq.costs`. What Python adds around the operations is in `Profile.seconds` only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxq.costs import Costs, Others, key_of
from fxq.graph import bind, is_call, line_of, module_of, mutations, submodule, target_name, unchanged
from fxq.inputs import Call
from fxq.tracing.values import tensors

LEAST_RUNS, SECONDS = 5, 0.5
LEAST = 5e-6
"""Seconds. Below, what Python does between two operations is most of the measured time, and says nothing of them."""


@dataclass(frozen=True)
class Timing:
    """One operation; seconds. predicted: None where it works in place, so that it cannot be run by itself."""

    module: str
    op: str
    node: str
    measured: float
    predicted: float | None


@dataclass(frozen=True)
class Profile:
    """The operations in graph order, and the seconds of a call of the model as a whole; `print` it."""

    timings: list[Timing]
    seconds: float

    @property
    def error(self) -> float:
        """The median of |predicted - measured| / measured over operations of `LEAST` and more; 0 without any."""
        compared = [t for t in self.timings if t.measured >= LEAST and t.predicted is not None]
        errors = [abs((t.predicted or 0.0) - t.measured) / t.measured for t in compared]
        return median(errors) if errors else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"timings": [vars(timing) for timing in self.timings], "seconds": self.seconds, "error": self.error}

    def __str__(self) -> str:
        total = sum(timing.measured for timing in self.timings)
        rows = [("module", "op", "us", "share", "predicted us")]
        for t in sorted(self.timings, key=lambda timing: -timing.measured):
            predicted = "" if t.predicted is None else f"{1e6 * t.predicted:.1f}"
            share = f"{100 * t.measured / total:.1f} %"
            rows.append((t.module or "(root)", t.op, f"{1e6 * t.measured:.1f}", share, predicted))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]).rstrip() for row in rows
        ]
        return "\n".join(
            [
                *lines,
                f"operations: {1e6 * total:.1f} us; a call: {1e6 * self.seconds:.1f} us",
                f"predictions are off by {100 * self.error:.0f} % in the median",
            ]
        )


class _Clock:
    """A copy of a graph that notes the time before and after every operation; its constants are those of `gm`.

    The copy runs as generated code, as the graph itself does: an interpreter would leave cold caches to each operation.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.now: list[float] = []
        graph = copy.deepcopy(gm.graph)
        pairs = zip(gm.graph.nodes, list(graph.nodes), strict=True)
        self.nodes = [node for node, _ in pairs if is_call(node)]
        for node in [node for node in graph.nodes if is_call(node)]:
            for place in (graph.inserting_before, graph.inserting_after):
                with place(node):
                    graph.call_function(self._stamp)
        self.run = GraphModule(gm, graph)
        self.spent: dict[Node, list[float]] = {node: [] for node in self.nodes}

    def _stamp(self) -> None:
        self.now.append(time.perf_counter())

    def __call__(self, call: Call) -> None:
        self.now.clear()
        self.run(*call.args, **call.kwargs)
        for node, start, end in zip(self.nodes, self.now[::2], self.now[1::2], strict=True):
            self.spent[node].append(end - start)


def _function(interpreter: Interpreter, node: Node) -> Callable[..., Any]:
    """What `node` calls, with nothing of the interpreter around it."""
    if node.op == "call_module":
        return submodule(interpreter.module, node)  # type: ignore[arg-type]
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


class _Predictor(Interpreter):
    """Runs a graph once and takes each operation's cost, on the operands that it then has."""

    def __init__(self, gm: GraphModule, costs: Costs, in_place: set[Node], wanted: Collection[Node]) -> None:
        super().__init__(gm)
        self.costs, self.in_place, self.wanted = costs, in_place, wanted
        self.predicted: dict[Node, float | None] = {}
        self.others = Others(gm)

    def run_node(self, n: Node) -> Any:
        if not is_call(n) or n not in self.wanted:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        function = _function(self, n)
        result = function(*args, **kwargs)
        if next(tensors(result), None) is not None:
            self.predicted[n] = None
            if n not in self.in_place:
                self.predicted[n] = self._cost(n, args, kwargs)
        return result

    def _cost(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """The cost of `n`, whose operands have just been computed, while its constants have made room for others."""
        function = _function(self, n)
        key = key_of(self.module, n, args, kwargs)  # type: ignore[arg-type]
        computed = list(tensors([self.env[operand] for operand in n.all_input_nodes if operand.op != "get_attr"]))

        def between() -> None:
            self.others.run()
            for operand in computed:
                operand.clone()

        return self.costs.of(f"{key}{self.others}", lambda: function(*args, **kwargs), between)


def predict(
    gm: GraphModule, call: Call, costs: Costs, wanted: Collection[Node] | None = None
) -> dict[Node, float | None]:
    """Seconds of operations of `gm` by themselves, on the operands that they have in this call; None of in-place ones.

    wanted: which; by default all.
    """
    own = call.clone()
    in_place = set(mutations(gm, own.args, own.kwargs))
    predictor = _Predictor(gm, costs, in_place, list(gm.graph.nodes) if wanted is None else wanted)
    with torch.no_grad(), unchanged(gm):
        predictor.run(*bind(gm, own.args, own.kwargs))
    return predictor.predicted


def measure(gm: GraphModule, call: Call, costs: Costs) -> Profile:
    """Profile a graph on one call; `costs` learns what it did not know."""
    predicted = predict(gm, call, costs)
    clock = _Clock(gm)
    wholes: list[float] = []
    end = time.perf_counter() + SECONDS
    with torch.no_grad(), unchanged(gm):
        while len(wholes) < LEAST_RUNS or time.perf_counter() < end:
            clock(call.clone())
            own = call.clone()
            start = time.perf_counter()
            gm(*own.args, **own.kwargs)
            wholes.append(time.perf_counter() - start)
    timings = [
        Timing(module_of(n) or line_of(n), target_name(n.target), n.name, median(clock.spent[n]), seconds)
        for n, seconds in predicted.items()
    ]
    return Profile(timings, median(wholes))

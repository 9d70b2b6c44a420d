"""Where the time of a call goes: each operation measured in its place, beside what `fxq.costs` predicts.

*measured* is the median over runs of the whole graph, between its neighbours, whose code and data it finds in the
caches instead of its own; *predicted* is what the same operation took where it was first met, such as the graph that
`judge_costs` tried. What Python adds around the operations is in `Profile.seconds` only.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.costs import Costs, beside, key_of
from fxq.expansion import expand_blocks
from fxq.graph import Interpreter, bind, is_call, line_of, module_of, submodule, target_name, unchanged
from fxq.inputs import Call
from fxq.tracing.values import tensors

LEAST_RUNS, SECONDS = 5, 0.5
"""Of a profile."""
ROUNDS, COST_SECONDS = (3, 25), 0.1
"""Runs of a graph by which its operations are priced: as many as fill these seconds, within the first."""
LEAST = 5e-6
"""Seconds. Below, what Python does between two operations is most of the measured time, and says nothing of them."""


@dataclass(frozen=True)
class Timing:
    """One operation; seconds."""

    module: str
    op: str
    node: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Profile:
    """The operations in graph order, and the seconds of a call of the model as a whole; `print` it."""

    timings: list[Timing]
    seconds: float

    @property
    def error(self) -> float:
        """The median of |predicted - measured| / measured over operations of `LEAST` and more; 0 without any."""
        errors = [abs(t.predicted - t.measured) / t.measured for t in self.timings if t.measured >= LEAST]
        return median(errors) if errors else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"timings": [vars(timing) for timing in self.timings], "seconds": self.seconds, "error": self.error}

    def __str__(self) -> str:
        total = sum(timing.measured for timing in self.timings)
        rows = [("module", "op", "us", "share", "predicted us")]
        for t in sorted(self.timings, key=lambda timing: -timing.measured):
            share = f"{100 * t.measured / total:.1f} %"
            rows.append((t.module or "(root)", t.op, f"{1e6 * t.measured:.1f}", share, f"{1e6 * t.predicted:.1f}"))
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


class _Keys(Interpreter):
    """Runs a graph once; keys: of the operations that give tensors, on the operands that they then have."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.keys: dict[Node, str] = {}
        self.beside = beside(gm)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if is_call(n) and next(tensors(result), None) is not None:
            key = key_of(self.module, n, *self.fetch_args_kwargs_from_env(n))  # type: ignore[arg-type]
            self.keys[n] = f"{key}{self.beside}"
        return result


def _price(gm: GraphModule, call: Call, keys: Mapping[Node, str]) -> dict[str, float]:
    """Seconds by key, each the median over all places and runs of a graph."""
    clock = _Clock(gm)
    least, most = ROUNDS
    with torch.no_grad(), unchanged(gm):
        for _ in range(2):  # the first prepares, the second tells how many
            start = time.perf_counter()
            clock(call.clone())
            seconds = time.perf_counter() - start
        clock.spent = {node: [] for node in clock.nodes}
        for _ in range(max(least, min(most, int(COST_SECONDS / seconds)))):
            clock(call.clone())
    spent: dict[str, list[float]] = defaultdict(list)
    for node, key in keys.items():
        spent[key] += clock.spent[node]
    return {key: median(seconds) for key, seconds in spent.items()}


def predict(gm: GraphModule, call: Call, costs: Costs, wanted: Collection[Node] | None = None) -> dict[Node, float]:
    """Seconds of operations of `gm` on the operands that they have in this call, of those that give tensors.

    Where one is not known yet, all of `gm` is timed. wanted: which; by default all.
    """
    interpreter = _Keys(gm)
    own = call.clone()
    with torch.no_grad(), unchanged(gm):
        interpreter.run(*bind(gm, own.args, own.kwargs))
    keys = interpreter.keys
    prices = functools.cache(lambda: _price(gm, call, keys))

    def price(key: str) -> float:
        return costs.of(key, lambda: prices()[key])

    return {node: price(key) for node, key in keys.items() if wanted is None or node in wanted}


def measure(gm: GraphModule, call: Call, costs: Costs) -> Profile:
    """Profile a graph on one call, a block's operations each by itself; `costs` learns what it did not know."""
    parts = expand_blocks(gm)
    predicted = predict(parts, call, costs)
    clock = _Clock(parts)
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
        Timing(module_of(n) or line_of(n), _kind(parts, n), n.name, median(clock.spent[n]), seconds)
        for n, seconds in predicted.items()
    ]
    return Profile(timings, median(wholes))


def _kind(gm: GraphModule, node: Node) -> str:
    """What an operation is called: of a module its class."""
    return type(submodule(gm, node)).__name__ if node.op == "call_module" else target_name(node.target)

"""One call of a float graph and of the integer graph made of it, with every value of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxq.graph import Interpreter, bind, memory_of, mutations, unchanged
from fxq.inputs import Call
from fxq.qdq import dequantize
from fxq.randomness import States, same_states, states
from fxq.spelling import GETITEM
from fxq.tracing.values import tensors


class _Values(Interpreter):
    """Runs a graph and keeps every value; of those in memory that the graph modifies later, a copy.

    drawn: for the nodes that draw random numbers, where the generators were before. writes: for those that work in
    place, the nodes whose memory they modify; views: those of them whose memory an earlier node has. later: what of
    those nodes is read afterwards, by the node that has modified it.
    """

    def __init__(self, gm: GraphModule, call: Call) -> None:
        super().__init__(gm, garbage_collect_values=False)
        probe, own = call.clone(), call.clone()
        self.writes = mutations(gm, probe.args, probe.kwargs)
        self.modified = {node for nodes in self.writes.values() for node in nodes} | self.writes.keys()
        self.views: set[Node] = set()
        self.later: dict[Node, dict[Node, Any]] = {}
        self._first: dict[int, Node] = {}
        self._writer: dict[Node, Node] = {}
        self.values: dict[Node, Any] = {}
        self.drawn: dict[Node, States] = {}
        with torch.no_grad(), unchanged(gm):
            self.run(*bind(gm, own.args, own.kwargs))

    def run_node(self, n: Node) -> Any:
        for x in n.all_input_nodes:
            if x in self._writer and self._writer[x] not in self.later.setdefault(x, {}):
                self.later[x][self._writer[x]] = _copy(self.env[x])
        self._writer |= dict.fromkeys(self.writes.get(n, ()), n)
        before = states()
        result = super().run_node(n)
        if not same_states(before, states()):
            self.drawn[n] = before
        self.values[n] = result
        if n in self.modified:
            self.values[n] = _copy(result)
            if any(self._first.setdefault(memory_of(tensor), n) is not n for tensor in tensors(result)):
                self.views.add(n)
        return result


def _copy(value: Any) -> Any:
    """In memory of its own."""
    return pytree.tree_map_only(Tensor, Tensor.clone, value)


@dataclass(frozen=True)
class PairedRuns:
    """One call of a float graph and of the integer graph made of it.

    expected: the float values, by node name. actual: those of the integer graph. qparams, factors: what its integers
    stand for. drawn, views, later: of the float run, by name. writes: of both; as in `_Values`. places: the nodes of
    the integer graph, numbered; those that work in place also by what they stand for.
    """

    reference: GraphModule
    quantized: GraphModule
    expected: Mapping[str, Any]
    actual: Mapping[Node, Any]
    qparams: Mapping[Node, tuple[float, int]]
    factors: Mapping[Node, Tensor | None]
    drawn: Mapping[str, States]
    views: Set[str]
    later: Mapping[str, Mapping[str, Any]]
    writes: Mapping[Node, tuple[Node, ...]]
    places: Mapping[Node | str, int]

    @classmethod
    def of(
        cls,
        reference: GraphModule,
        quantized: GraphModule,
        call: Call,
        reached: Call | None = None,
        equalized: Mapping[str, tuple[int, list[float]]] | None = None,
    ) -> PairedRuns:
        """See `compare_graphs`."""
        exact = _Values(reference, call)
        expected = {node.name: value for node, value in exact.values.items()}
        drawn = {node.name: before for node, before in exact.drawn.items()}
        views = {node.name for node in exact.views}
        made = _Values(quantized, call if reached is None else reached)
        actual, writes = made.values, exact.writes | made.writes
        later = {n.name: {w.name: value for w, value in found.items()} for n, found in exact.later.items()}
        places: dict[Node | str, int] = {node: i for i, node in enumerate(quantized.graph.nodes)}
        places |= {node.meta.get("source", ""): places[node] for node in made.writes}
        qparams = {node: node.meta["qparams"] for node in quantized.graph.nodes if "qparams" in node.meta}
        factors = {node: _factor(node, actual, equalized or {}) for node in quantized.graph.nodes}
        return cls(reference, quantized, expected, actual, qparams, factors, drawn, views, later, writes, places)

    def writer(self, source: str, at: Node) -> str | None:
        """What of the float graph has modified the value `source` last, before `at` of the integer graph, if any."""
        before = [w for w in self.later.get(source, ()) if self.places.get(w, math.inf) < self.places[at]]
        return before[-1] if before else None

    def exact(self, source: str, node: Node, at: Node) -> Any:
        """The float value `source`, which `node` stands for, as it is where `at` of the integer graph stands.

        None where there is none. Dimensions of size 1 are those that `node` has: a pool keeps what a mean drops.
        """
        writer = self.writer(source, at)
        truth = self.expected.get(source) if writer is None else self.later[source][writer]
        reached = self.actual[node]
        if not (isinstance(truth, Tensor) and isinstance(reached, Tensor)):
            return truth
        same = [n for n in truth.shape if n != 1] == [n for n in reached.shape if n != 1]
        return truth.reshape(reached.shape) if same else truth

    def real(self, node: Node, value: Any) -> Any:
        """What `value`, which `node` of the integer graph gives, stands for."""
        if isinstance(value, tuple | list):
            return value[0]  # beside it the same in integers
        factor = self.factors[node]
        found = dequantize(value, *self.qparams[node]) if node in self.qparams else value
        return found if factor is None else found / factor


def _factor(node: Node, actual: Mapping[Node, Any], equalized: Mapping[str, tuple[int, list[float]]]) -> Tensor | None:
    """What `node` was multiplied by, per channel, before it became integers."""
    if node.meta.get("source") in equalized and isinstance(actual[node], Tensor):
        dim, divisors = equalized[node.meta["source"]]
        shape = [1] * actual[node].dim()
        shape[dim] = -1
        return (1 / torch.tensor(divisors)).reshape(shape)
    if node.target is GETITEM and isinstance(node.args[0], Node):
        return _factor(node.args[0], actual, equalized)
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.name == "factor" and isinstance(value, Node):
                factor: Tensor = actual[value]
                return factor
    return None

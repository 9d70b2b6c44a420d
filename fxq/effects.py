"""What the noise of each layer does to the output: the quantized run once more, without it.

    v(n) = f_n(v(operands of n)) + e(n)        f_n: in float;  e(n): the own noise of n, as it was in the quantized run

With every e(n) these are the values of the quantized run. Without those of a module, and with all others held, the
output shows what that module costs. A rounding that only prepares what an operation reads is that operation's own. What
draws random numbers draws those of the float run. What reads memory that was modified depends on what modified it, and
is computed from the value that was there first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fxq.comparison import output_sqnr
from fxq.graph import Interpreter, module_of, unchanged
from fxq.ops.norm import norm_quantize
from fxq.paired_runs import PairedRuns
from fxq.randomness import set_states


class Effects:
    """The own noise of every operation of a quantized run, and runs without that of some."""

    def __init__(self, runs: PairedRuns) -> None:
        self.runs = runs
        self.interpreter = Interpreter(runs.reference, garbage_collect_values=False)
        self.float_nodes = {node.name: node for node in runs.reference.graph.nodes}
        self.order = {node: i for i, node in enumerate(runs.reference.graph.nodes)}
        self.reads = _reads(runs.reference.graph, runs.writes) | _reads(runs.quantized.graph, runs.writes)
        self.written = {node for writer, held in runs.writes.items() for node in (writer, *held)}
        self.operands: dict[Node, dict[str, Node]] = {}  # those that have a float value, by its name
        self.real: dict[Node, Tensor] = {}
        self.noise: dict[Node, Tensor] = {}
        known: dict[Node, dict[str, Node]] = {}
        for node in runs.quantized.graph.nodes:
            operands = {name: each for x in self.reads[node] for name, each in known[x].items()}
            source = node.meta.get("source", "")
            truth = runs.expected.get(source)
            value = None if node.op == "output" else runs.real(node, runs.actual[node])
            if node.op == "output":
                self.output = next(n for n in runs.reference.graph.nodes if n.op == "output")
                self.returned = operands
            elif (
                isinstance(truth, Tensor)
                and isinstance(value, Tensor)
                and truth.is_floating_point()
                and truth.shape == value.shape
                and source not in operands
                and source not in runs.views
                and runs.writer(source, node) is None
                and node.target is not norm_quantize  # a norm is float, what it rounds is for those that read it
            ):
                self.operands[node], self.real[node] = operands, value
                operands = {source: node}
            known[node] = operands

    def without(self, module: str) -> float:
        """The output's SQNR in dB without the own noise of the operations of `module`."""
        values: dict[Node, Tensor] = {}  # those that differ from the quantized run's
        with torch.no_grad(), unchanged(self.runs.reference):
            for node, operands in self.operands.items():
                own = module_of(node) == module
                if own or not values.keys().isdisjoint(operands.values()):
                    value = self._float(node, operands, values)
                    values[node] = value if own else value + self._noise(node)
            result = self._between(self.output, self.returned, values)
        return output_sqnr(self.runs.expected[self.output.name], result)

    def _noise(self, node: Node) -> Tensor:
        if node not in self.noise:
            self.noise[node] = self.real[node] - self._float(node, self.operands[node], {})
        return self.noise[node]

    def _float(self, node: Node, operands: Mapping[str, Node], values: Mapping[Node, Tensor]) -> Tensor:
        value: Tensor = self._between(self.float_nodes[node.meta["source"]], operands, values)
        return value

    def _between(self, target: Node, operands: Mapping[str, Node], values: Mapping[Node, Tensor]) -> Any:
        """The value of a float node, computed from those of `operands`, and from exact ones where it reads others."""
        env = self.interpreter.env = {
            self.float_nodes[name]: values.get(x, self.real[x]).clone() for name, x in operands.items()
        }
        steps = self._steps(target, operands.keys())
        for node in {x for step in steps for x in step.all_input_nodes} - env.keys() - set(steps):
            exact, own = self.runs.expected[node.name], node.op == "get_attr" and node not in self.written
            env[node] = exact if own else pytree.tree_map_only(Tensor, Tensor.clone, exact)
        for step in steps:
            if step.name in self.runs.drawn:
                set_states(self.runs.drawn[step.name])
            env[step] = self.interpreter.run_node(step)
        return env.get(target, self.runs.expected[target.name])

    def _steps(self, target: Node, given: Set[str]) -> list[Node]:
        """The nodes, in graph order, that lead from those named `given` to `target`, or write to memory on the way."""
        above, stack = set(), [target]
        while stack:
            node = stack.pop()
            if node not in above and node.name not in given and node.op not in ("placeholder", "get_attr"):
                above.add(node)
                stack.extend(self.reads[node])
        reached: set[Node] = set()
        for node in sorted(above, key=self.order.__getitem__):
            if node in self.written or any(x.name in given or x in reached for x in self.reads[node]):
                reached.add(node)
        return sorted(reached, key=self.order.__getitem__)


def _reads(graph: Graph, writes: Mapping[Node, tuple[Node, ...]]) -> dict[Node, list[Node]]:
    """For each node its operands, and what has modified their memory before. writes: as in `PairedRuns`."""
    reads: dict[Node, list[Node]] = {}
    writers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        operands = node.all_input_nodes
        reads[node] = list(dict.fromkeys([*operands, *(writer for x in operands for writer in writers.get(x, ()))]))
        for held in writes.get(node, ()):
            writers.setdefault(held, []).append(node)
    return reads


def effects_of(runs: PairedRuns, modules: Iterable[str]) -> dict[str, float]:
    """For each of `modules` that the integer graph has operations of: the output's SQNR in dB without its own noise."""
    effects = Effects(runs)
    own = {module_of(node) for node in effects.operands}
    return {module: effects.without(module) for module in modules if module in own}

"""Where accuracy is lost: signal to quantization noise per layer, alone and accumulated.

    SQNR = 10 log10( sum x^2 / sum (x - y)^2 )  in dB; x the float value, y the dequantized one; inf for equal ones

*alone*: the layer is given the exact float inputs, quantized; *accumulated*: what reaches it in the quantized model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxq.errors import InputError
from fxq.graph import (
    Interpreter,
    Value,
    bind,
    is_call,
    line_of,
    memory_of,
    module_of,
    mutations,
    place_of,
    target_name,
    unchanged,
)
from fxq.inputs import Call
from fxq.outputs import dequantized, output_qparams
from fxq.qdq import dequantize, quantize
from fxq.qtypes import ACT_QMAX, ACT_QMIN
from fxq.randomness import States, same_states, states
from fxq.spelling import CONVS, GETITEM, LINEAR, RELU
from fxq.stages import is_integer_op
from fxq.tracing import structure
from fxq.tracing.values import tensors

_PRODUCTS = CONVS | {LINEAR}
_SELECTIONS = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "bincount")


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in dB, in float64; inf for equal tensors, nan for empty ones.

    And for those of different shapes, as there may be where values decide on sizes.
    """
    if not expected.numel() or expected.shape != actual.shape:
        return math.nan
    x, y = expected.detach().double(), actual.detach().double()
    noise, signal = (float(np.sum(part.numpy())) for part in ((x - y) ** 2, x**2))  # torch's sum depends on the threads
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def output_sqnr(expected: Any, actual: Any) -> float:
    """The worst SQNR over the float tensors of an output, NaN the worst of all; inf where there are none."""
    pairs = zip(tensors(expected), tensors(actual), strict=True)
    values = [sqnr(x.to_dense(), y.to_dense()) for x, y in pairs if x.is_floating_point() and x.numel()]
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value, default=math.inf)


@dataclass(frozen=True)
class Spread:
    """How the float values of a layer lie in the range of its integers.

    low, high: the smallest and largest value; counts: of `BINS` equal bins between them; range: what uint8 can hold.
    clipped: the share of values outside of it; used: the share of the 256 integers between the smallest and largest.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    range: tuple[float, float]
    clipped: float
    used: float


BINS = 64
ANOTHER_MODEL = "compare it with the model that it was quantized from, on inputs which that takes"
FLOAT_ROUNDING = 100.0
"""dB. What is above rounds no integers: float32 alone, as a norm does; it has no place in a picture of noise."""
EQUAL = 0.1
"""dB. Of remedies as good as that, the first is taken; float is the last."""
CANDIDATES = 64
"""Of so many of the noisiest layers the effect on the output is looked for: each is one more run in float."""
FOUND_BY = f"""suspects: of the {CANDIDATES} noisiest layers those without whose own noise, all else as it is, the
output gains most (layers inside of leaves, whose effect is not known, come last)"""


@dataclass(frozen=True)
class Remedy:
    """A recipe with one rule more, as Python text; output: the SQNR in dB that the model reaches with it."""

    recipe: str
    output: float


@dataclass(frozen=True)
class Suspect:
    """A module whose own noise costs the output much; SQNR in dB.

    alone: as of its noisiest layer; before: of the model's output; without: of the output without the module's own
    noise, None inside of a leaf; tried: float last.
    """

    module: str
    alone: float
    before: float
    without: float | None
    tried: tuple[Remedy, ...]

    @property
    def best(self) -> Remedy | None:
        """The remedy that helps most; None where none helps."""
        most = max((remedy.output for remedy in self.tried), default=self.before)
        found = (remedy for remedy in self.tried if remedy.output >= most - EQUAL)  # of infinite ones as well
        return next(found) if most > self.before + EQUAL else None

    def __str__(self) -> str:
        head = f"{self.module}: {self.alone:.1f} dB alone; "
        if self.without is not None:
            head += f"without its own noise the output would be at {self.without:.1f} dB; "
        if not self.tried:
            return f"{head}no remedy was tried, for lack of time: give fxq.compare more `seconds`"
        if self.best is None:
            left = self.tried[-1].output
            return f"{head}none of {len(self.tried)} remedies helps, in float it leaves the output at {left:.1f} dB"
        return f"{head}the output goes from {self.before:.1f} to {self.best.output:.1f} dB with\n  {self.best.recipe}"


@dataclass(frozen=True)
class Layer:
    """One operation of the quantized model against its float counterpart; SQNR in dB; spread: where it gives uint8."""

    module: str
    op: str
    node: str
    alone: float
    accumulated: float
    spread: Spread | None = None

    def __str__(self) -> str:
        text = f"{self.module or '(root)'}  {self.op}  {self.alone:.1f} dB alone, {self.accumulated:.1f} dB accumulated"
        if self.spread is None:
            return text
        return f"{text}, {100 * self.spread.clipped:.2g} % clipped, {100 * self.spread.used:.0f} % of the range used"


@dataclass(frozen=True)
class Comparison:
    """All layers in graph order, and the output's SQNR in dB."""

    layers: list[Layer]
    output: float
    suspects: list[Suspect] = field(default_factory=list)
    """Those that cost the output most, with what was tried for them: `fxq.compare(..., calibration_data=...)`."""

    def worst(self, count: int) -> list[Layer]:
        """The layers that lose most by themselves."""
        return sorted(self.layers, key=lambda layer: layer.alone)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def plot(self, path: str | Path) -> Path:
        """Noise along the depth, and for the three worst layers their values in their range; needs matplotlib.

        Layers are numbered from 0, as they come in `layers`; what only rounds floats has no noise of its own.
        path: of a picture, svg, png or pdf. Raises `InputError` where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise InputError("a plot needs matplotlib: pip install 'fxq[plots]'") from error
        numbers = {id(layer): i for i, layer in enumerate(self.layers)}
        spread = [layer for layer in self.worst(len(self.layers)) if layer.spread is not None][:3]
        figure = Figure(figsize=(9, 4 if not spread else 6.5), layout="constrained")
        grid = figure.add_gridspec(2 if spread else 1, max(1, len(spread)))
        depth = figure.add_subplot(grid[0, :])
        rounded = [(i, layer.alone) for i, layer in enumerate(self.layers) if layer.alone < FLOAT_ROUNDING]
        reached = [(i, layer.accumulated) for i, layer in enumerate(self.layers) if math.isfinite(layer.accumulated)]
        for points, style, label in ((rounded, "o-", "alone"), (reached, "s-", "accumulated")):
            depth.plot([i for i, _ in points], [noise for _, noise in points], style, label=label, markersize=4)
        depth.set(ylabel="SQNR, dB", xlabel="layer, in the order of the graph")
        depth.xaxis.set_major_locator(MaxNLocator(integer=True))
        depth.legend()
        for column, layer in enumerate(spread):
            assert layer.spread is not None
            axes, found = figure.add_subplot(grid[1, column]), layer.spread
            width = (found.high - found.low) / BINS or 1.0
            axes.bar([found.low + (i + 0.5) * width for i in range(BINS)], found.counts, width, log=True)
            for bound in found.range:
                axes.axvline(bound, color="#a86a00", linestyle=":")
            axes.set(xlabel="float value; dotted: what uint8 holds", ylabel="" if column else "how many")
            place = _shortened(layer.module or layer.op)
            axes.set_title(f"layer {numbers[id(layer)]}: {layer.alone:.1f} dB alone\n{place}", fontsize=9)
        figure.savefig(Path(path))
        return Path(path)

    def __str__(self) -> str:
        rows = [("module", "op", "alone dB", "accumulated dB", "clipped", "range used")]
        for layer in self.layers:
            found = layer.spread
            shares = ("", "") if found is None else (f"{100 * found.clipped:.2g} %", f"{100 * found.used:.0f} %")
            place = layer.module or "(root)"
            rows.append((place, layer.op, f"{layer.alone:.1f}", f"{layer.accumulated:.1f}", *shares))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]).rstrip() for row in rows
        ]
        suspects = [FOUND_BY, *map(str, self.suspects)] if self.suspects else []
        return "\n".join([*lines, f"output: {self.output:.1f} dB", *suspects])


def _shortened(path: str) -> str:
    """The end of a module's path that fits over a third of a picture."""
    return path if len(path) <= 36 else f"...{path[-33:]}"


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
class Runs:
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
    ) -> Runs:
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


def compare_graphs(
    reference: GraphModule,
    quantized: GraphModule,
    call: Call,
    reached: Call | None = None,
    equalized: Mapping[str, tuple[int, list[float]]] | None = None,
) -> Comparison:
    """Compare a normalised float graph with the integer graph made of it, on one call.

    Nodes are matched by `meta["source"]`: the float node whose value an integer node stands for; products that torch
    has quantized, whose graph was another, by their module. reached: the call as it reaches the integer graph, where
    that is another. equalized: as in `Report`.
    """
    return compare_runs(Runs.of(reference, quantized, call, reached, equalized))


def compare_runs(runs: Runs) -> Comparison:
    """See `compare_graphs`."""
    expected, actual, qparams, factors = runs.expected, runs.actual, runs.qparams, runs.factors
    by_module = _products_by_module(runs.reference)
    check_shapes = (lambda *_: None) if _is_sized_by_values(runs.reference) else _check_shapes
    layers = []
    for node in runs.quantized.graph.nodes:
        source = node.meta.get("source", "")
        truth = runs.exact(source if source in expected else _float_of(node, by_module), node, node)
        if not (is_call(node) and is_integer_op(node)) or not isinstance(truth, Tensor) or node.target is dequantize:
            continue
        reached = runs.real(node, actual[node])
        check_shapes(place_of(node), [truth], [reached])
        alone = sqnr(truth, runs.real(node, _alone(node, runs)))
        accumulated = sqnr(truth, reached)
        place = module_of(node) or line_of(node)
        spread = None
        if node in qparams and isinstance(actual[node], Tensor) and actual[node].numel():
            spread = _spread(truth, actual[node], factors[node], *qparams[node])
        layers.append(Layer(place, target_name(node.target), node.name, alone, accumulated, spread))
    first, second = (next(n for n in gm.graph.nodes if n.op == "output") for gm in (runs.reference, runs.quantized))
    result = dequantized(actual[second], output_qparams(runs.quantized.graph))
    made, wanted = structure(result), structure(expected[first.name])
    if made != wanted:
        raise InputError(f"the output is {wanted} in the float model and {made} in the quantized one; {ANOTHER_MODEL}")
    check_shapes("the output", list(tensors(expected[first.name])), list(tensors(result)))
    return Comparison(layers, output_sqnr(expected[first.name], result))


def _is_sized_by_values(gm: GraphModule) -> bool:
    """Whether values of tensors decide on the sizes of others, so that a rounding may change them."""

    def selects(node: Node) -> bool:
        indices = node.all_input_nodes[1:] if node.target is GETITEM else []
        masks = (isinstance(v := x.meta.get("value"), Value) and v.dtype in (torch.bool, torch.uint8) for x in indices)
        return any(masks) or target_name(node.target).strip("_") in _SELECTIONS

    return any(map(selects, filter(is_call, gm.graph.nodes)))


def _check_shapes(where: str, truth: list[Tensor], reached: list[Tensor]) -> None:
    """Raise `InputError` where the two models are not of one architecture."""
    if [x.shape for x in truth] != [y.shape for y in reached]:
        shapes = (", ".join(str(list(x.shape)) for x in values) for values in (truth, reached))
        what = "{} in the float model and {} in the quantized one".format(*shapes)
        raise InputError(f"{where} has the shape {what}; {ANOTHER_MODEL}")


def _products_by_module(reference: GraphModule) -> dict[tuple[str, str], str]:
    """For each module with one product alone: the nodes of its value, and of the relu that alone reads it."""
    products = [node for node in reference.graph.nodes if node.target in _PRODUCTS and module_of(node)]
    alone = Counter(map(module_of, products))
    found = {}
    for node in products:
        if alone[module_of(node)] == 1:
            found[module_of(node), "product"] = node.name
            readers = list(node.users)
            if len(readers) == 1 and readers[0].target is RELU:
                found[module_of(node), "relu"] = readers[0].name
    return found


def _float_of(node: Node, products: Mapping[tuple[str, str], str]) -> str:
    """The float node of an integer product, by its module; of its relu where it is clamped at the zero point."""
    if not isinstance(node.target, OpOverload) or not target_name(node.target).startswith(("fxq.qlinear", "fxq.qconv")):
        return ""
    named = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}
    product = products.get((module_of(node), "product"), "")
    clamped = "low" in named and named["low"] == named["zero_point"]
    return products.get((module_of(node), "relu"), product) if clamped else product


def _spread(truth: Tensor, q: Tensor, factor: Tensor | None, scale: float, zero_point: int) -> Spread:
    values = (truth if factor is None else truth * factor).double()
    low, high = ((bound - zero_point) * scale for bound in (ACT_QMIN, ACT_QMAX))
    outside = (values < low - scale / 2) | (values > high + scale / 2)
    smallest, largest = (bound.item() for bound in torch.aminmax(values))
    counts = torch.histc(values, BINS, smallest, largest) if smallest < largest else torch.tensor([values.numel()])
    return Spread(
        smallest,
        largest,
        tuple(int(count) for count in counts.tolist()) + (0,) * (BINS - len(counts)),
        (low, high),
        outside.double().mean().item(),
        (int(q.max()) - int(q.min()) + 1) / (ACT_QMAX - ACT_QMIN + 1),
    )


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


def _alone(node: Node, runs: Runs) -> Any:
    """What `node` computes from the exact float values of its operands."""
    actual, qparams = runs.actual, runs.qparams

    def exact(operand: Node) -> Any:
        truth = runs.exact(operand.meta.get("source", ""), operand, node)
        several = isinstance(actual[operand], tuple | list)  # of which one is that float value
        if isinstance(truth, Tensor) and not several:
            factor = runs.factors[operand]
            scaled = truth if factor is None else truth * factor
            return quantize(scaled, *qparams[operand]) if operand in qparams else truth
        if operand.op == "call_function" and (operand in qparams or several) and callable(operand.target):
            return operand.target(*torch.fx.node.map_arg(operand.args, exact))  # scaled: no float value to compare with
        return actual[operand]

    with torch.no_grad():
        args = torch.fx.node.map_arg(node.args, exact)
        assert callable(node.target)
        return node.target(*args, **node.kwargs)

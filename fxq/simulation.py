"""A graph with observers, run on calibration data in float and with the rounding of integers, side by side.

Node by node, so that a pass sees what a product gives in both before anything behind it has run, can change its
constants, and hands on what it then gives: errors are seen where they arrive, those from above corrected already.
A value goes after its last use. In float a weight is what it was, whatever integers stand for it. Both run in float64
where the recipe asks for the same model on every machine (`fxq.double`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.comparison import output_sqnr
from fxq.double import Runner, narrowed, widened
from fxq.fake_quantize import FakeQuantize
from fxq.graph import STATE, Value, bind, submodule
from fxq.inputs import Call
from fxq.memory import give_back
from fxq.observers import Observer, Rows, WeightObserver
from fxq.pipeline import Context
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, integers_of, quantize
from fxq.qtypes import QParams
from fxq.randomness import Randomness, seed, set_states, states
from fxq.recipe import Recipe
from fxq.sampling import Sample, sample_of
from fxq.spelling import CONV_TRANSPOSE, CONVS, LINEAR

MOST_WORK = 20 * 10**9
"""Multiply-accumulates of one run over all calls, each value that is computed counting as 100: a second of one core or
two. Two calls may take more."""
PRODUCTS = CONVS | {LINEAR, CONV_TRANSPOSE}


def calibrated_products(gm: GraphModule, recipe: Recipe) -> list[Node]:
    """The products between a value and a weight that calibration has made ready to be integers, in graph order.

    Those of "w8a8-dynamic" where the recipe as a whole is static. None where fake quantizers have trained the model, or
    it keeps state from call to call, which running it would move.
    """
    trained = any(isinstance(module, FakeQuantize) for module in gm.modules())
    if trained or gm.meta.get(STATE):
        return []
    values = Observer | Rows if recipe.scheme == "w8a8" else Observer
    return [
        node
        for node in gm.graph.nodes
        if node.target in PRODUCTS
        and all(
            operand.op == "call_module" and isinstance(submodule(gm, operand), kind)
            for operand, kind in zip(node.args, (values, WeightObserver), strict=False)
        )
    ]


def rows_of(product: Node, value: Tensor) -> Tensor:
    """What a product gives, as a matrix [rows and places, N]."""
    channel = value if product.target is LINEAR else value.movedim(1, -1)
    return channel.reshape(-1, channel.shape[-1])


def halves(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several calls, parted into those to fit to and those to judge by; of one call, its first and second half.

    Either may be empty.
    """
    if len(values) == 1:
        first, second = values[0].tensor_split(2)
        return first, second
    return torch.cat(list(values[::2])), torch.cat(list(values[1::2]))


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Without gradients, from one seed, on one thread: on more, sums and LAPACK may round differently, and constants
    follow from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), Randomness():
            seed()
            yield
    finally:
        torch.set_num_threads(threads)


class _Run(Runner):
    """One call of a graph, a step at a time; rounding: what its observers make of what they see."""

    def __init__(
        self, gm: GraphModule, call: Call, rounding: Callable[[nn.Module, Tensor], Tensor], double: bool
    ) -> None:
        super().__init__(gm, double)
        self.gm = gm
        self.rounding = rounding
        own = call.clone()
        self.args_iter = iter(bind(gm, own.args, own.kwargs))

    def step(self, node: Node) -> None:
        self.env[node] = self.run_node(node)

    def forget(self, node: Node) -> None:
        """Drop what nothing behind `node` reads."""
        for dead in self.user_to_last_uses.get(node, ()):
            self.env.pop(dead, None)

    def observe(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.rounding(module, x)


class Simulation:
    """Runs of `gm` on some of the calibration data, else on the examples.

    sample: where it is not a part of `gm`. exact: in float, and with `exact_only` nothing else; before: in integers, as
    the graph was, on the data that is judged by; rounded: in integers, with what `rerun` was told of.
    gain: in dB, what the output has gained in the end, on the data that is judged by; reached: its SQNR there.
    """

    def __init__(self, gm: GraphModule, ctx: Context, exact_only: bool = False, sample: Sample | None = None) -> None:
        self.gm = gm
        self.ctx = ctx
        sample = sample or sample_of(gm)
        calls = sample.calls if sample is not None and sample.calls else [ctx.examples]
        values = [node.meta.get("value") for node in gm.graph.nodes if node.op != "get_attr"]
        numbers = sum(math.prod(value.shape) for value in values if isinstance(value, Value))
        work = sum(decision.macs for decision in ctx.report.decisions) + 100 * numbers
        calls = calls[: max(2, MOST_WORK // max(1, work))]
        self.exact = self._runs(calls, self._pass_on)
        self.judged = [] if exact_only else calls[1::2] or calls
        self.before = self._runs(self.judged, self._round)
        self.rounded = [] if exact_only else self._runs(calls, self._round)
        self.gain = 0.0
        self.reached = math.inf
        self._known: list[tuple[Any, float]] = []
        self._weight_of: tuple[nn.Module | None, bool, Tensor] = None, False, torch.empty(0)
        self._qparams: dict[nn.Module, QParams] = {}

    def _runs(self, calls: Sequence[Call], rounding: Callable[[nn.Module, Tensor], Tensor]) -> list[_Run]:
        return [_Run(self.gm, call, rounding, self.ctx.recipe.reproducible) for call in calls]

    def stops(self, nodes: Set[Node], what: str) -> Iterator[Node]:
        """Run all; each of `nodes` is given out right after it has run. what: the work, for the progress bar.

        All of it on one thread, so that any number gives the same model.
        """
        runs = [*self.exact, *self.before, *self.rounded]
        with self.ctx.bar(what, len(nodes)) as bar, _reproducible():
            for node in self.gm.graph.nodes:  # those that a pass puts ahead are run as well
                before = states()
                for run in runs:  # all with the same random numbers
                    set_states(before)
                    run.step(node)
                if node in nodes:
                    yield node
                    give_back()
                    bar.update()
                if node.op == "output" and self.rounded:
                    self._judge(node)
                for run in runs:
                    run.forget(node)

    def values(self, node: Node) -> tuple[list[Tensor], list[Tensor]]:
        """What `node` gave in the exact runs, and in the rounded ones."""
        return [run.env[node] for run in self.exact], [run.env[node] for run in self.rounded]

    def is_comparable(self, node: Node) -> bool:
        """Whether `node` gave the same shapes in both: where values decide on sizes, rounding may change them."""
        return all(x.shape == y.shape for x, y in zip(*self.values(node), strict=True))

    def rerun(self, product: Node) -> None:
        """Run `product` once more in the rounded runs: its weight or bias has changed."""
        for run in self.rounded:
            for operand in product.args[1:3]:
                if isinstance(operand, Node):
                    for source in (*operand.all_input_nodes, operand):
                        run.step(source)
            run.step(product)

    def _judge(self, output: Node) -> None:
        exact, rounded = ([run.env[output] for run in runs] for runs in (self.exact, self.rounded))
        exact, rounded = exact[1::2] or exact, rounded[1::2] or rounded
        before = [output_sqnr(y, run.env[output]) for y, run in zip(exact, self.before, strict=True)]
        self._known = list(zip(exact, before, strict=True))
        self.gain = self._gain(rounded)

    def _gain(self, outputs: list[Any]) -> float:
        reached = [output_sqnr(exact, y) for (exact, _), y in zip(self._known, outputs, strict=True)]
        gains = [now - was if now != was else 0.0 for now, (_, was) in zip(reached, self._known, strict=True)]
        self.reached = sum(reached) / len(reached)
        return sum(gains) / len(gains)

    def _pass_on(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an observer gives in float."""
        if isinstance(module, WeightObserver):
            return self._weight(module, x, rounded=False)
        return widened(x) if self.ctx.recipe.reproducible else x

    def _round(self, module: nn.Module, x: Tensor) -> Tensor:
        rounded: Tensor
        if isinstance(module, Rows):
            rounded = fake_quantize_rows(narrowed(x))
            return rounded
        if isinstance(module, WeightObserver):
            return self._weight(module, x, rounded=True)
        assert isinstance(module, Observer)
        q = self._qparams.get(module) or self._qparams.setdefault(module, module.qparams())
        rounded = dequantize(quantize(narrowed(x), q.scale, q.zero_point), q.scale, q.zero_point)
        return rounded

    def _weight(self, observer: WeightObserver, w: Tensor, rounded: bool) -> Tensor:
        """What a product multiplies by; all runs come to it one after the other, the exact ones first."""
        *known, weight = self._weight_of
        if known != [observer, rounded]:
            weight = dequantize_weight(*integers_of(observer, w), w.dtype) if rounded else observer(w)
            self._weight_of = observer, rounded, weight
        return weight


@dataclass(frozen=True)
class Change:
    """What a method has done to a product: the effect, for the report, and what takes it back."""

    effect: str
    undo: Callable[[], None]


class Fitter(Protocol):
    """A method at work on one graph: `products` are those that it may change."""

    @property
    def products(self) -> Set[Node]: ...

    def fit(self, product: Node, simulation: Simulation) -> Change | None:
        """Change the constants of `product`, which has just run, where that pays."""
        ...


class Method(Protocol):
    """A way of fitting the constants of products to calibration data; what: those constants, for people."""

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...

    def begin(self, gm: GraphModule, ctx: Context) -> Fitter | None:
        """None where the recipe has switched it off."""
        ...

"""A graph with observers, run on calibration data in float and with the rounding of integers, side by side.

Node by node, so that a pass sees what a product gives in both before anything behind it has run, can change its
constants, and hands on what it then gives: errors are seen where they arrive, those from above corrected already.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from tqdm import tqdm

from fxq.comparison import output_sqnr
from fxq.fake_quantize import FakeQuantize
from fxq.graph import STATE, Value, bind, submodule
from fxq.inputs import Call
from fxq.observers import Observer, Rows, Sample, WeightObserver, sample_of
from fxq.pipeline import Context
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, quantize, quantize_weight
from fxq.recipe import Recipe
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
def _one_thread() -> Iterator[None]:
    """On more, sums and LAPACK may round differently, and constants follow from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Run(Interpreter):
    """One call of a graph, a step at a time; rounding: what its observers make of what they see."""

    def __init__(self, gm: GraphModule, call: Call, rounding: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__(gm)
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

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.gm.get_submodule(target)
        if isinstance(module, Observer | Rows | WeightObserver):
            return args[0] if self.rounding is None else self.rounding(module, args[0])
        return super().call_module(target, args, kwargs)


class Simulation:
    """Runs of `gm` on some of the calibration data, else on the examples.

    sample: where it is not a part of `gm`. exact: in float, and with `exact_only` nothing else; before: in integers, as
    the graph was; rounded: in integers, with what `rerun` was told of.
    gain: in dB, what the output has gained in the end, on the data that is judged by; reached: its SQNR there.
    """

    def __init__(self, gm: GraphModule, ctx: Context, exact_only: bool = False, sample: Sample | None = None) -> None:
        self.gm = gm
        self.progress = ctx.progress
        sample = sample or sample_of(gm)
        calls = sample.calls if sample is not None and sample.calls else [ctx.examples]
        values = [node.meta.get("value") for node in gm.graph.nodes if node.op != "get_attr"]
        numbers = sum(math.prod(value.shape) for value in values if isinstance(value, Value))
        work = sum(decision.macs for decision in ctx.report.decisions) + 100 * numbers
        calls = calls[: max(2, MOST_WORK // max(1, work))]
        self.exact = [_Run(gm, call, None) for call in calls]
        inexact = [] if exact_only else calls
        self.before, self.rounded = ([_Run(gm, call, self._round) for call in inexact] for _ in range(2))
        self.gain = 0.0
        self.reached = math.inf
        self._weight: tuple[nn.Module | None, Tensor] = None, torch.zeros(0)

    def stops(self, nodes: Set[Node], what: str) -> Iterator[Node]:
        """Run all; each of `nodes` is given out right after it has run. what: the work, for the progress bar.

        All of it on one thread, so that any number gives the same model.
        """
        bar = tqdm(
            total=len(nodes),
            desc=what,
            unit="layer",
            delay=0 if self.progress else 2,
            disable=self.progress is False,
            leave=False,
        )
        runs = [*self.exact, *self.before, *self.rounded]
        with bar, torch.no_grad(), torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(0)
            for node in self.gm.graph.nodes:  # those that a pass puts ahead are run as well
                for run in runs:
                    run.step(node)
                if node in nodes:
                    yield node
                    bar.update()
                if node.op == "output" and self.rounded:
                    self.gain = self._gain(node)
                for run in runs:
                    run.forget(node)

    def values(self, node: Node) -> tuple[list[Tensor], list[Tensor]]:
        """What `node` gave in the exact runs, and in the rounded ones."""
        return [run.env[node] for run in self.exact], [run.env[node] for run in self.rounded]

    def rerun(self, product: Node) -> None:
        """Run `product` once more in the rounded runs: its weight or bias has changed."""
        for run in self.rounded:
            for operand in product.args[1:3]:
                if isinstance(operand, Node):
                    for source in (*operand.all_input_nodes, operand):
                        run.step(source)
            run.step(product)

    def _gain(self, output: Node) -> float:
        judged = slice(1, None, 2) if len(self.exact) > 1 else slice(None)
        triples = list(zip(self.exact, self.before, self.rounded, strict=True))[judged]
        gains, reached = [], []
        for exact, *others in triples:
            before, after = (output_sqnr(exact.env[output], other.env[output]) for other in others)
            gains.append(after - before if after != before else 0.0)
            reached.append(after)
        self.reached = sum(reached) / len(reached)
        return sum(gains) / len(gains)

    def _round(self, module: nn.Module, x: Tensor) -> Tensor:
        rounded: Tensor
        if isinstance(module, Rows):
            rounded = fake_quantize_rows(x)
            return rounded
        if isinstance(module, WeightObserver):
            if self._weight[0] is not module:  # all runs come to it one after the other
                scales = module.scales_of(x)
                self._weight = module, dequantize_weight(quantize_weight(x, scales), scales, x.dtype)
            return self._weight[1]
        assert isinstance(module, Observer)
        q = module.qparams()
        rounded = dequantize(quantize(x, q.scale, q.zero_point), q.scale, q.zero_point)
        return rounded

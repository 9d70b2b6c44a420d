"""judge_lookup: a function that eight bits of its operand would ruin on the examples stays float.

A table rounds a function's operand to eight bits, which most functions bear, as their results have no more bits either.
One that is steep in a small part of its operand's range (an exponential, 1 / x) or nearly constant in most of it (an
ELU of values down to -100) does not. No rule tells beforehand. Each is run on the examples by its table, with the
ranges that calibration has found. One below `LEAST_SQNR`, and more than `LEAST_LOSS` below what rounding its result
alone leaves, reads float again, where no integers are tied to what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.decisions import Reason
from fxq.double import Runner, narrowed
from fxq.elementwise import Span, span_of
from fxq.fake_quantize import FakeQuantize
from fxq.graph import bind, erase_unused, submodule, unchanged
from fxq.observers import Observer, paused
from fxq.ops.lookup import lookup, lookup_channels
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, quantize
from fxq.releasing import release
from fxq.spelling import CAT, GETITEM, MAX_POOLS, MOVES, SPLITS
from fxq.stages import Stage

LEAST_SQNR = 20.0
"""dB, of the function alone."""
LEAST_LOSS = 6.0
"""dB below what rounding the result alone leaves."""


@dataclass(frozen=True)
class JudgeLookup:
    """See the module's docstring."""

    name: str = "judge-lookup"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns how often it found functions that must stay float, which the report names."""
        details: dict[str, str] = {}
        count = 0
        while refused := self._refuse(gm, ctx):  # which may join what was two functions
            details |= refused
            count += 1
        ctx.report.decisions = [
            replace(d, form="float", reason=Reason.UNPROFITABLE, detail=details[d.node], scheme="")
            if d.node in details
            else d
            for d in ctx.report.decisions
        ]
        return count

    def _refuse(self, gm: GraphModule, ctx: Context) -> dict[str, str]:
        """Let the functions that lose too much read floats; their operations' names, with what they reached."""
        spans = _find(gm)
        if not spans:
            return {}
        own = ctx.examples.clone()
        with torch.no_grad(), unchanged(gm), paused(gm), ctx.bar("judging tables of functions", len(spans)) as bar:
            judge = _Judge(gm, spans, ctx.recipe.reproducible, bar.update)
            judge.run(*bind(gm, own.args, own.kwargs))
        refused: dict[str, str] = {}
        for span in spans:
            reached, possible = judge.sqnr[span.root]
            if not (reached >= LEAST_SQNR or possible - reached <= LEAST_LOSS) and _release(gm, span):
                detail = f"by a table {reached:.1f} dB by itself on the examples"
                refused |= {node.meta["source"]: detail for node in span.nodes}
        return refused


def _observer(gm: GraphModule, node: Node) -> Observer | None:
    module = submodule(gm, node) if node.op == "call_module" else None
    trained = isinstance(module, FakeQuantize)  # its rounding is a part of what was trained
    return module if isinstance(module, Observer) and module.seen and not trained else None


def _find(gm: GraphModule) -> list[Span]:
    """The functions of one value that is to be an integer, the largest of those within one another."""
    found: list[Span] = []
    taken: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        span = None if node in taken else span_of(gm, node)
        if span is not None and _observer(gm, span.source) is not None:
            found.append(span)
            taken |= set(span.inner())
    return found


class _Judge(Runner):
    """Runs a graph, and each function once more by its table. sqnr: what that reaches, and what it could at best.

    done: called after each.
    """

    def __init__(self, gm: GraphModule, spans: list[Span], double: bool, done: Callable[[], object]) -> None:
        super().__init__(gm, double)
        self.gm = gm
        self.done = done
        self.spans = {span.root: span for span in spans}
        self.read: dict[Node, Tensor] = {}
        self.last_read = {span.source: span.root for span in reversed(spans)}
        self.sqnr: dict[Node, tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.last_read:
            self.read[n] = result
        if n in self.spans:
            span = self.spans[n]
            self.sqnr[n] = self._judge(span, self.read[span.source], result)
            self.done()
            if self.last_read[span.source] is n:
                del self.read[span.source]
        return result

    def _judge(self, span: Span, x: Tensor, exact: Tensor) -> tuple[float, float]:
        observer = _observer(self.gm, span.source)
        assert observer is not None
        if not exact.numel():
            return math.inf, math.inf
        p = observer.qparams()
        table = span.table(self.gm, dequantize(torch.arange(256, dtype=torch.uint8), p.scale, p.zero_point))
        q = quantize(narrowed(x), p.scale, p.zero_point)
        y = lookup(q, table) if span.dim is None else lookup_channels(q, table, span.dim)
        rounded = exact
        after = [found for user in span.root.users if (found := _observer(self.gm, user)) is not None]
        if after:
            p = after[0].qparams()
            y, rounded = (
                dequantize(quantize(narrowed(v), p.scale, p.zero_point), p.scale, p.zero_point) for v in (y, exact)
            )
        return sqnr(exact, y), sqnr(exact, rounded)


def _release(gm: GraphModule, span: Span) -> bool:
    """Let the function read the value itself, where that is not tied to other integers; whether it does."""
    value = span.source.args[0]
    assert isinstance(value, Node)
    only = set(span.nodes).issuperset(span.source.users)
    if not only and value.target in MOVES | SPLITS | CAT | MAX_POOLS | {GETITEM}:
        return False
    for node in span.nodes:
        node.replace_input_with(span.source, value)
    erase_unused(gm, span.source)
    release(gm, span.nodes)
    return True


PASS = JudgeLookup()

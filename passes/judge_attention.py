"""judge_attention: an attention whose integers lose too much on the examples stays float.

A softmax takes the exponential of its scores, so the noise of q and k counts for as much as their products are large;
and one large channel of q, to which k answers with nothing, takes the range of all. No rule tells beforehand what that
costs. Each attention is run on the examples in float and in integers, with the ranges that calibration has found; one
below `LEAST_SQNR` loses the observers of its q, k and v, and those of the values that nobody else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.decisions import Reason
from fxq.double import Runner, narrowed
from fxq.fake_quantize import FakeQuantize
from fxq.graph import bind, submodule, unchanged
from fxq.observers import Observer, paused
from fxq.ops.attention import qattention_float
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize
from fxq.releasing import release
from fxq.spelling import ATTENTION
from fxq.stages import Stage

LEAST_SQNR = 20.0
"""dB, of the attention alone. Static uint8 gives 27 to 36 dB on a trained sentence encoder."""


@dataclass(frozen=True)
class JudgeAttention:
    """See the module's docstring."""

    name: str = "judge-attention"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of attentions that stay float; the report tells what all of them reached."""
        found = [node for node in gm.graph.nodes if node.target is ATTENTION and _observers(gm, node) is not None]
        if not found:
            return 0
        own = ctx.examples.clone()
        with torch.no_grad(), unchanged(gm), paused(gm), ctx.bar("judging attention", len(found)) as bar:
            judge = _Judge(gm, found, ctx.recipe.reproducible, bar.update)
            judge.run(*bind(gm, own.args, own.kwargs))
        refused = [node for node in found if judge.sqnr[node] < LEAST_SQNR and _release(gm, node)]
        details = {
            node.name: f"{reached:.1f} dB by itself on the examples"
            for node, reached in judge.sqnr.items()
            if reached == reached
        }
        kept = {node.name for node in refused}
        ctx.report.decisions = [
            replace(d, form="float", reason=Reason.UNPROFITABLE, detail=f"in integers {details[d.node]}")
            if d.node in kept
            else replace(d, detail=details.get(d.node, d.detail))
            for d in ctx.report.decisions
        ]
        return len(refused)


def _observers(gm: GraphModule, node: Node) -> tuple[Observer, ...] | None:
    """The observers of q, k and v; None where one of them is not to become an integer, or where they have trained."""
    modules = [submodule(gm, x) if isinstance(x, Node) and x.op == "call_module" else None for x in node.args[:3]]
    observers = tuple(m for m in modules if isinstance(m, Observer))
    if any(isinstance(m, FakeQuantize) for m in observers):
        return None  # their rounding is a part of what was trained
    return observers if len(observers) == 3 and all(m.seen for m in observers) else None


class _Judge(Runner):
    """Runs a graph and each of `found` once more, in integers; done: called after each."""

    def __init__(self, gm: GraphModule, found: Sequence[Node], double: bool, done: Callable[[], object]) -> None:
        super().__init__(gm, double)
        self.gm = gm
        self.done = done
        self.found = frozenset(found)
        self.sqnr: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.found:
            args, _ = self.fetch_args_kwargs_from_env(n)
            observers = _observers(self.gm, n)
            assert observers is not None
            s, z = zip(*((p.scale, p.zero_point) for p in (o.qparams() for o in observers)), strict=True)
            integers = [quantize(x, *p) for x, *p in zip(narrowed(args[:3]), s, z, strict=True)]
            mask, is_causal, scale, nan_if_masked = narrowed(args[3:])
            operands = (*integers, mask, is_causal, scale, z[0], z[2], s[0] * s[1], s[2], nan_if_masked)
            y = qattention_float(*operands)
            self.sqnr[n] = sqnr(result.nan_to_num(), y.nan_to_num())
            self.done()
        return result


def _release(gm: GraphModule, attention: Node) -> bool:
    """Take away the observers whose values only `attention` reads; whether one of its own went."""
    release(gm, (attention,))
    return _observers(gm, attention) is None


PASS = JudgeAttention()

"""judge_costs: an island whose integers would take longer than floats on this machine stays float.

Nothing tells beforehand what becomes one operation and what borders remain, so the graph is lowered on trial, with
ranges of the examples. What hands each other integers there is an island, the quantize before it and the dequantize
behind it included. Its operations are timed in such a graph (`fxq.costs`), as are the float operations that they stand
for; where the integers take longer in sum, all of them stay float, with both predictions in the report. That moves the
borders of others, so the rest is tried again until no island loses. Losses that together are within 1 % of what all
islands take in float are borne: they are within the error of a measurement, and int8 weights are a quarter as large.

A choice by time differs between machines: `Recipe(judge_costs=False)` leaves it out, and so does `reproducible=True`.
Weight-only schemes are chosen for memory, and requant="fixed" for hardware; they are not judged. Nor is anything on the
portable kernels, which are there to be exact.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from fxq import kernels, pipeline
from fxq.costs import Costs
from fxq.errors import FileError
from fxq.graph import is_call, unchanged
from fxq.observers import learning
from fxq.pipeline import TOLD, Context, Numbers, Pass
from fxq.profiling import predict
from fxq.qtypes import QuantSpec
from fxq.stages import Stage, is_integer_op, quantized_nodes
from fxq.tracing.sharing import shared

Island = tuple[set[Node], set[Node]]
"""Operations of the trial graph, and those of the float graph that they stand for."""


BORNE = 0.01
"""Of the seconds that all islands take in float."""
FOR_TIME = "in int8 with its borders"
"""In the details of what stays float for its time."""


@dataclass(frozen=True)
class JudgeCosts:
    """See the module's docstring. annotate: the pass that decides; trial: from its decisions to integers."""

    annotate: Pass
    trial: tuple[Pass, ...]
    name: str = "judge-costs"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of operations that stay float for their time."""
        timed = ctx.recipe.judge_costs and not ctx.recipe.reproducible
        if not timed or ctx.recipe.requant == "fixed" or kernels.info().isa == "portable":
            return 0
        start, costs, before = time.perf_counter(), Costs(), len(ctx.unprofitable)
        with ctx.bar("timing operations", None, "round") as bar:  # nobody knows how many
            while found := self._losers(gm, ctx, costs):
                ctx.unprofitable |= found
                ctx.specs.clear()
                self.annotate.run(gm, ctx)
                bar.update()
        try:
            costs.save()
        except FileError as error:
            ctx.report.notes.append(f"the times of operations are measured anew each time: {error}")
        count = len(ctx.unprofitable) - before
        seconds = time.perf_counter() - start
        if count or seconds > TOLD:
            ctx.report.seconds[self.name] = count, seconds
        if count:
            ctx.report.notes.append(
                f"operations that stay float for their time on this machine: {count}; "
                "Recipe(judge_costs=False) makes them int8"
            )
        return count

    def _losers(self, gm: GraphModule, ctx: Context, costs: Costs) -> dict[str, str]:
        """The int8 operations whose islands lose, by name, with both predictions."""
        int8 = {decision.node for decision in ctx.report.decisions if decision.form == "int8"}
        if not int8:
            return {}
        trial = self._lower(gm, ctx)
        islands = [(new, old) for new, old in _islands(gm, trial) if not int8.isdisjoint(node.name for node in old)]
        news, olds = (set[Node]().union(*(island[i] for island in islands)) for i in (0, 1))
        integer, floating = (predict(graph, ctx.examples, costs, nodes) for graph, nodes in ((trial, news), (gm, olds)))
        found: dict[str, str] = {}
        costs_of = [(sum(integer[n] for n in new), sum(floating.get(n, 0.0) for n in old), old) for new, old in islands]
        borne = BORNE * sum(theirs for _, theirs, _ in costs_of)
        for ours, theirs, old in sorted(costs_of, key=lambda cost: cost[0] - cost[1]):
            borne -= max(0.0, ours - theirs)
            if borne < 0:
                detail = f"predicted {1e6 * ours:.1f} us {FOR_TIME}, {1e6 * theirs:.1f} us in float"
                found |= dict.fromkeys(int8 & {node.name for node in old}, detail)
        return found

    def _lower(self, gm: GraphModule, ctx: Context) -> GraphModule:
        """A copy of `gm`, on the memory of its constants, as it would be in integers."""
        trial = shared(gm)
        trial.meta = dict(gm.meta)
        specs = {p: QuantSpec("min_max") if isinstance(s, QuantSpec) else s for p, s in ctx.specs.items()}
        recipe = replace(ctx.recipe, balance=False, round_weights=None)
        own = Context(recipe, ctx.families, ctx.examples, copy.deepcopy(ctx.report), specs=specs)
        pipeline.run(self.trial[:1], trial, own)
        examples = ctx.examples.clone()
        with torch.no_grad(), unchanged(trial), learning(trial):
            trial(*examples.args, **examples.kwargs)
        return pipeline.run(self.trial[1:], trial, own)


def _islands(gm: GraphModule, trial: GraphModule) -> list[Island]:
    """The islands of `trial`. What has become a part of an operation goes to the island of the first that reads it."""
    integers = quantized_nodes(trial)
    ties: nx.Graph[Node] = nx.Graph()
    ties.add_nodes_from(n for n in trial.graph.nodes if is_call(n) and (is_integer_op(n) or n in integers))
    ties.add_edges_from((q, user) for q in integers for user in q.users if q in ties and user in ties)
    islands: list[set[Node]] = list(nx.connected_components(ties))
    owner = {node.meta["source"]: i for i, island in enumerate(islands) for node in island if "source" in node.meta}
    kept = {(node.meta.get("source"), node.target) for node in trial.graph.nodes if node not in ties}
    gone = [node for node in gm.graph.nodes if is_call(node) and (node.name, node.target) not in kept]
    olds: list[set[Node]] = [set() for _ in islands]
    for node in reversed(gone):
        readers = (owner[user.name] for user in node.users if user.name in owner)
        island = owner.get(node.name, next(readers, None))
        if island is not None:
            owner[node.name] = island
            olds[island].add(node)
    return list(zip(islands, olds, strict=True))

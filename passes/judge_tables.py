"""judge_tables: embedding tables stay float where rounding them makes more noise than all the rest of the network.

A table is most of a small model's memory, and a scale for each row costs no time, so tables are int8. But where the
output is little more than what the tables hold, as in a network whose residual branches add little, their eight bits
are all that is lost. The output in integers is compared with the output of the same integers behind float tables, on a
sample of the calibration data. Where float tables gain `LEAST_GAIN`, they stay; then those that the output does not
need go back to int8, one after the other.

Not where nothing but tables is integer: int8 tables are then all there is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxq.decisions import Reason
from fxq.graph import erase_unused, submodule
from fxq.observers import WeightObserver
from fxq.pipeline import Context, Numbers
from fxq.sampling import Sample, sample_of
from fxq.simulation import Simulation, calibrated_products
from fxq.stages import Stage

LEAST_GAIN = 3.0
"""dB of the output: the noise of the tables is that of all the rest."""
MOST_LOSS = 0.3
"""dB of the output, of a table that goes back."""


@dataclass(frozen=True)
class JudgeTables:
    """See the module's docstring."""

    name: str = "judge-tables"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of embeddings that stay float, which the report names with what that gains."""
        if not ctx.recipe.judge_tables:
            return 0
        found = [node for node in gm.graph.nodes if node.target is F.embedding and _observed(gm, node) is not None]
        if not found or not calibrated_products(gm, ctx.recipe):
            return 0
        gain = _gain(gm, ctx, found)
        if not gain >= LEAST_GAIN:
            return 0
        kept = list(found)
        for node in found if len(found) > 1 else ():
            others = [other for other in kept if other is not node]
            if others and _gain(gm, ctx, others) > gain - MOST_LOSS:
                kept = others
        for node in kept:
            observed = _observed(gm, node)
            assert observed is not None and isinstance(observed.args[0], Node)
            node.replace_input_with(observed, observed.args[0])
            erase_unused(gm, observed)
        names = {node.name for node in kept}
        detail = f"with int8 tables (judge_tables=False) the output loses {gain:.1f} dB"
        ctx.report.decisions = [
            replace(d, form="float", reason=Reason.UNPROFITABLE, detail=detail, scheme="") if d.node in names else d
            for d in ctx.report.decisions
        ]
        return len(kept)


def _observed(gm: GraphModule, embedding: Node) -> Node | None:
    """The table as it is to be rounded; None where it is not."""
    table = embedding.args[1]
    if isinstance(table, Node) and table.op == "call_module" and isinstance(submodule(gm, table), WeightObserver):
        return table
    return None


def _gain(gm: GraphModule, ctx: Context, embeddings: Collection[Node]) -> float:
    """What the output gains in dB where the tables of `embeddings` are float."""
    known, few = sample_of(gm), Sample()
    if known is not None:  # one is enough: the noise of a table is that of thousands of rows already
        few.calls = known.calls[1:2] or known.calls
    simulation = Simulation(gm, ctx, sample=few)
    for node in simulation.stops(set(embeddings), "judging tables"):
        for exact, run in zip(simulation.exact, simulation.rounded, strict=True):
            run.env[node] = exact.env[node]
    return simulation.gain


PASS = JudgeTables()

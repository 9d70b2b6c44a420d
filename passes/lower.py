"""lower: dequantize -> op -> quantize becomes one integer op, with packed weights and a precomputed bias.

Each op family knows its own trees (`Family.lower`). From the last node to the first, so that the longest tree wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from fxq.pipeline import Context, Numbers
from fxq.stages import Stage


@dataclass(frozen=True)
class Lower:
    """See the module's docstring."""

    name: str = "lower"
    takes: Stage = Stage.QDQ
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.ONE_STEP

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Offer each node to the families, in their order."""
        count = 0
        for node in reversed(list(gm.graph.nodes)):
            if not node._erased and node.op == "call_function":
                count += any(family.lower(gm, node, ctx.report.notes) for family in ctx.families)
        return count


PASS = Lower()

"""share_ranges: what is concatenated takes the range of the concatenation where its own is hardly smaller.

`annotate` leaves a value that is concatenated and read by others a range of its own, so that a large neighbour does not
cost it its resolution; its integers are then requantized where they are concatenated. Calibration has now seen both
ranges. Where the common one is at most `NEAR` times as wide, little is lost, and nothing has to be requantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.fake_quantize import FakeQuantize
from fxq.graph import submodule
from fxq.observers import Observer
from fxq.pipeline import Context, Numbers
from fxq.spelling import CAT
from fxq.stages import Stage

NEAR = 1.5


@dataclass(frozen=True)
class ShareRanges:
    """See the module's docstring."""

    name: str = "share-ranges"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of ranges that are one with another now."""
        count = 0
        for cat in [node for node in gm.graph.nodes if node.target in CAT]:
            common = [user for user in cat.users if _observer(gm, user) is not None]
            if len(common) != 1:
                continue
            for source in cat.all_input_nodes:
                if _may_share(gm, source, common[0]):
                    _share(gm, str(source.target), str(common[0].target))
                    count += 1
        return count


def _observer(gm: GraphModule, node: Node) -> Observer | None:
    module = submodule(gm, node) if node.op == "call_module" else None
    trained = isinstance(module, FakeQuantize)  # its rounding is a part of what was trained
    return module if isinstance(module, Observer) and module.seen and not trained else None


def _may_share(gm: GraphModule, source: Node, common: Node) -> bool:
    own, wide = _observer(gm, source), _observer(gm, common)
    if own is None or wide is None or own is wide:
        return False
    return 1 <= wide.qparams().scale / own.qparams().scale <= NEAR


def _share(gm: GraphModule, path: str, common: str) -> None:
    """Let the observer at `common` stand in all places of the one at `path`."""
    for node in gm.graph.find_nodes(op="call_module", target=path):
        node.target = common


PASS = ShareRanges()

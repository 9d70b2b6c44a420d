"""keep_dropout: dropouts stay in a graph that is to be trained, each as one module.

    nn.Dropout(p), F.dropout(x, p, training=False), ...    -> Dropout(p), active in training mode

The graph is traced in eval mode, where a dropout does nothing, and one that was called as a function with
`training=self.training` reads False: both are taken to drop in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import bypass, call, submodule
from fxq.ops.dropout import FUNCTIONS, Dropout
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage

HOLDER = "dropouts"
"""The submodule that holds the dropouts."""


@dataclass(frozen=True)
class KeepDropout:
    """See the module's docstring."""

    name: str = "keep-dropout"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of dropouts."""
        count = 0
        for node in list(gm.graph.nodes):
            found = _dropout(gm, node)
            if found is not None:
                if not hasattr(gm, HOLDER):
                    gm.add_module(HOLDER, nn.Module())
                x, dropout = found
                path = f"{HOLDER}.{node.name}"
                gm.add_submodule(path, dropout.eval())
                with gm.graph.inserting_before(node):
                    bypass(gm, node, call(gm, path, (x,), node))
                count += 1
        return count


def _dropout(gm: GraphModule, node: Node) -> tuple[Node, Dropout] | None:
    """The operand of a dropout, and the module that is to stand for it."""
    if node.op == "call_module":
        module = submodule(gm, node)
        function = FUNCTIONS.get(type(module))
        if function is None:
            return None
        named = {"input": node.args[0] if node.args else node.kwargs["input"], "p": module.p}
    elif node.op == "call_function" and node.target in FUNCTIONS:
        function = FUNCTIONS[node.target]
        named = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
        if named.get("training", named.get("train", True)) is not False:
            return None  # it drops in eval mode as well
    else:
        return None
    x, p = named["input"], named.get("p", 0.5)
    assert isinstance(x, Node) and isinstance(p, int | float)
    return x, Dropout(function, p)


PASS = KeepDropout()

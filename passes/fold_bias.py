"""fold_bias: an add of one constant number per channel becomes the bias of the linear before it.

    add(linear(x, w, None), b)  -> linear(x, w, b)

b is [N], or [1, ..., N] of no higher rank than the result. The product adds the bias at another place in its sum, so
the last bits may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.graph import constant, get_attr, replace, set_constant
from fxq.pattern import Any, Match, Op
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD, LINEAR
from fxq.stages import Stage

_LINEAR = Op({LINEAR}, Any("x"), Any("w"), Any("none"), name="linear")
_SUMS = (Op({ADD}, _LINEAR, Any("bias")), Op({ADD}, Any("bias"), _LINEAR))


@dataclass(frozen=True)
class FoldBias:
    """See the module's docstring."""

    name: str = "fold-bias"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of adds that became biases."""
        return sum(_fold(gm, node, pattern) for node in list(gm.graph.nodes) for pattern in _SUMS)


def _fold(gm: GraphModule, add: Node, pattern: Op) -> bool:
    match = pattern.match(add)
    if not isinstance(match, Match) or match["none"] is not None or "aliases" in add.meta:
        return False
    linear, b = match.node("linear"), match["bias"]
    if not isinstance(b, Node) or b.op != "get_attr" or {"aliases"} & {*b.meta, *linear.meta}:
        return False
    bias, channels = constant(gm, b), linear.meta["value"].shape[-1:]
    if bias.shape[-1:] != channels or bias.numel() != channels[0] or bias.dim() > len(linear.meta["value"].shape):
        return False
    with gm.graph.inserting_before(linear):
        path = str(b.target) if bias.dim() == 1 else set_constant(gm, f"{b.target}_flat", bias.detach().flatten())
        operand = get_attr(gm, path, b)
    replace(gm, add, LINEAR, (*linear.args[:2], operand), like=linear)
    return True


PASS = FoldBias()

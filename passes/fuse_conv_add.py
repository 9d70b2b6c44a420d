"""fuse_conv_add: a residual add behind a convolution becomes its epilogue, with one rounding less.

    qadd(qconv(x, ...), b, ...)     ->  qconv_add(x, ..., b, ...)
    m' = m * s_c / s_y              the convolution's multiplier, in steps of the sum

Only where no one else reads the convolution, no clamp is in it, and `b` has the shape of its result. Of two
convolutions the later one takes the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.graph import constant, get_attr, replace, set_constant
from fxq.ops.add import qadd
from fxq.ops.conv import CLAMPED, qconv, qconv_add
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage


@dataclass(frozen=True)
class FuseConvAdd:
    """See the module's docstring."""

    name: str = "fuse-conv-add"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.ONE_STEP

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Offer each add its later operand first."""
        return sum(_fuse(gm, node) for node in list(gm.graph.nodes) if node.target is qadd)


def _fuse(gm: GraphModule, node: Node) -> int:
    a, b, m_a, z_a, m_b, z_b, *epilogue = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    pairs = ((a, b, m_b, z_b), (b, a, m_a, z_a))
    for conv, other, m, z in sorted(pairs, key=lambda pair: pair[0]._sort_key, reverse=True):
        if conv.target is not qconv or len(conv.users) != 1 or conv.meta[CLAMPED]:
            continue
        if conv is other or conv.meta["value"].shape != other.meta["value"].shape:
            continue
        multiplier = conv.args[3]
        assert isinstance(multiplier, Node)
        ratio = conv.meta["qparams"][0] / node.meta["qparams"][0]
        steps = (constant(gm, multiplier).double() * ratio).to(torch.float32)
        with gm.graph.inserting_before(node):
            own = get_attr(gm, set_constant(gm, f"{multiplier.target}_added", steps), conv)
        operands = (*conv.args[:3], own, *conv.args[4:6], other, m, z, *epilogue)
        replace(gm, node, qconv_add, operands, node.meta["qparams"], like=conv)
        return 1
    return 0


PASS = FuseConvAdd()

"""order_channels: an image that becomes integers for convolutions becomes channels-last in the same pass over it.

    qconv(quantize(x, s, z), ...)    ->  qconv(quantize_channels_last(x, s, z), ...)
    cat([qconv(...), ...], 1)        ->  qcat([qconv(...), ...])

The ops of `fxq.layout` read and give channels-last memory; shapes stay as they were, [B, C, *spatial]. So the order
changes at the borders only: here, and where a flatten or a float operation reads. An input that lies channels-last
already is not copied. Not where something else reads the integers before any such op does. Channels are joined in one
pass where all operands lie channels-last for certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.graph import replace
from fxq.ops.add import qadd
from fxq.ops.cat import qcat
from fxq.ops.conv import qconv, qconv_act_quantize, qconv_add, qconv_fixed, qconv_float
from fxq.ops.conv_transpose import qconv_transpose, qconv_transpose_fixed, qconv_transpose_float
from fxq.ops.fixed_point import qadd_fixed, qmul_fixed, requantize_fixed
from fxq.ops.lookup import lookup
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool, qadaptive_avg_pool_fixed, qavg_pool, qavg_pool_fixed, qmax_pool
from fxq.ops.upsample import qupsample_bilinear, qupsample_bilinear_fixed, qupsample_nearest
from fxq.pipeline import Context, Numbers
from fxq.qdq import quantize, quantize_channels_last, requantize
from fxq.spelling import CAT, PAD
from fxq.stages import Stage

_CHANNELS_LAST = frozenset(
    {
        *(qconv, qconv_act_quantize, qconv_add, qconv_fixed, qconv_float, qconv_transpose, qconv_transpose_float),
        *(qavg_pool_fixed, qadaptive_avg_pool_fixed, qconv_transpose_fixed, qupsample_bilinear_fixed),
        *(qavg_pool, qadaptive_avg_pool, qmax_pool, qupsample_nearest, qupsample_bilinear),
    }
)
_KEEP_ORDER = CAT | {PAD, lookup}
"""What gives the memory order that it reads."""
_AS_FIRST = frozenset({lookup, requantize, requantize_fixed, qadd, qadd_fixed, qmul, qmul_fixed})
"""The same, of the first operand where that has the shape of the result."""


@dataclass(frozen=True)
class OrderChannels:
    """See the module's docstring."""

    name: str = "order-channels"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of borders placed and of concatenations rewritten."""
        borders = [node for node in gm.graph.nodes if node.target is quantize and _wants_channels_last(node)]
        for node in borders:
            replace(gm, node, quantize_channels_last, node.args, node.meta["qparams"])
        cats = [node for node in gm.graph.nodes if _joins_channels(node)]
        for node in cats:
            replace(gm, node, qcat, node.args[:1], node.meta["qparams"])
        return len(borders) + len(cats)


def _joins_channels(node: Node) -> bool:
    """Whether `node` puts channels of integers side by side that all lie channels-last."""
    if node.target is not torch.cat or "qparams" not in node.meta or node.args[1:] != (1,):
        return False
    operands = node.args[0]
    assert isinstance(operands, list | tuple)
    return all(isinstance(operand, Node) and _lies_channels_last(operand) for operand in operands)


def _lies_channels_last(node: Node) -> bool:
    if node.target in _AS_FIRST:
        first = node.args[0]
        assert isinstance(first, Node)
        return _lies_channels_last(first) and first.meta["value"].shape == node.meta["value"].shape
    return node.target in _CHANNELS_LAST or node.target in (quantize_channels_last, qcat) or _joins_channels(node)


def _wants_channels_last(node: Node) -> bool:
    """Whether an op that reads channels-last memory reads `node`, directly or through moves that keep its order."""
    return any(
        user.target in _CHANNELS_LAST or (user.target in _KEEP_ORDER and _wants_channels_last(user))
        for user in node.users
    )


PASS = OrderChannels()

"""rewrite_batch_norm: a batch norm that no product takes in becomes a depthwise convolution, one pixel wide.

    y[b, c, ...] = x[b, c, ...] * g[c] + h[c];   g[c] = gamma[c] / sqrt(var[c] + eps);   h[c] = beta[c] - mean[c] * g[c]

As in DenseNet, which normalises before it multiplies, or behind a relu. Such a weight has one number per channel, and a
scale per channel, so int8 holds it exactly. A matrix [B, C] keeps its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import constant, get_attr, is_float_tensor, module_of, replace, set_constant
from fxq.pipeline import Context, Numbers
from fxq.spelling import BATCH_NORM
from fxq.stages import Stage


@dataclass(frozen=True)
class RewriteBatchNorm:
    """See the module's docstring."""

    name: str = "rewrite-batch-norm"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of norms rewritten."""
        return sum(_rewrite(gm, node) for node in list(gm.graph.nodes) if node.target is BATCH_NORM)


def _rewrite(gm: GraphModule, norm: Node) -> int:
    if len(norm.args) < 8 or norm.args[5] is not False or "aliases" in norm.meta:
        return 0  # it computes its own statistics, or its memory is modified
    x, *statistics = norm.args[:5]
    rank = len(norm.meta["value"].shape) - 2
    operands = [operand for operand in statistics if isinstance(operand, Node)]
    fixed = all(operand.op == "get_attr" and "aliases" not in operand.meta for operand in operands)
    if not is_float_tensor(x) or rank not in (1, 2, 3) or not fixed:
        return 0

    def value(operand: object) -> Tensor | None:
        return constant(gm, operand).detach().double() if isinstance(operand, Node) else None

    mean, var, gamma, beta = map(value, statistics)
    eps = norm.args[7]
    assert mean is not None and var is not None and isinstance(eps, float)
    gain = torch.rsqrt(var + eps) if gamma is None else gamma / torch.sqrt(var + eps)
    shift = -mean * gain if beta is None else beta - mean * gain
    ones = (1,) * rank
    with gm.graph.inserting_before(norm):
        weight, bias = (
            get_attr(gm, set_constant(gm, f"{module_of(norm)}.{name}".lstrip("."), tensor.float()), norm)
            for name, tensor in (("gain", gain.reshape(-1, 1, *ones)), ("shift", shift))
        )
    convs = (torch.conv1d, torch.conv2d, torch.conv3d)
    replace(gm, norm, convs[rank - 1], (x, weight, bias, ones, (0,) * rank, ones, len(gain)))
    return 1


PASS = RewriteBatchNorm()

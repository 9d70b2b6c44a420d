"""end_training: a trained graph becomes one that could have been calibrated; any other stays as it is.

norm(x, w, b)            ->  linear(x, fake_quantize(w_folded), b_folded)      the numbers of eval mode
norm(x)                  ->  batch_norm(x, mean, var, ...)
dropout(x)               ->  x
trained_attention(...)   ->  attention(...)                                its weights are rounded again by `lower`
as_strided(parameter)    ->  a constant
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.batch_norm import BatchNorm, FoldedBatchNorm
from fxq.fake_quantize import TrainedAttention
from fxq.graph import bypass, call, constant, get_attr, set_constant, submodule
from fxq.ops.dropout import Dropout
from fxq.pipeline import Context, Numbers
from fxq.spelling import ATTENTION, BATCH_NORM
from fxq.stages import Stage


@dataclass(frozen=True)
class EndTraining:
    """See the module's docstring."""

    name: str = "end-training"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.ONE_STEP  # an attention's; all others keep their bits

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a norm finds its weight a constant."""
        count = 0
        for node in list(gm.graph.nodes):
            if node.target is torch.as_strided:
                count += _fix(gm, node)
            elif node.op == "call_module":
                module = submodule(gm, node)
                if isinstance(module, FoldedBatchNorm):
                    count += _fold(gm, node, module)
                elif isinstance(module, BatchNorm):
                    count += _inline(gm, node, module)
                elif isinstance(module, TrainedAttention):
                    with gm.graph.inserting_before(node):
                        bypass(gm, node, call(gm, ATTENTION, node.args, node))
                    count += 1
                elif isinstance(module, Dropout):
                    (x,) = node.args
                    assert isinstance(x, Node)
                    ctx.report.decisions = [d for d in ctx.report.decisions if d.node != node.meta["source"]]
                    bypass(gm, node, x)
                    count += 1
        return count


def _fix(gm: GraphModule, node: Node) -> int:
    source, *shape = node.args
    if not isinstance(source, Node) or source.op != "get_attr":
        return 0
    part = torch.as_strided(constant(gm, source).detach(), *shape)  # type: ignore[arg-type]
    with gm.graph.inserting_before(node):
        bypass(gm, node, get_attr(gm, set_constant(gm, f"{source.target}_part", part), node))
    return 1


def _fold(gm: GraphModule, node: Node, norm: FoldedBatchNorm) -> int:
    x, w, b, *rest = node.args
    assert isinstance(w, Node) and isinstance(b, Node | None)
    with torch.no_grad():
        tensors = norm.folded(constant(gm, w), None if b is None else constant(gm, b))
    with gm.graph.inserting_before(node):
        stem = str(w.target).removesuffix("weight")
        paths = (f"{w.target}_folded", f"{stem}bias_folded")
        weight, bias = (
            get_attr(gm, set_constant(gm, path, tensor), node) for path, tensor in zip(paths, tensors, strict=True)
        )
        if norm.fake_quantize is not None:
            weight = call(gm, f"{node.target}.fake_quantize", (weight,), weight)
        bypass(gm, node, call(gm, norm.product, (x, weight, bias, *rest), node))
    return 1


def _inline(gm: GraphModule, node: Node, norm: BatchNorm) -> int:
    with gm.graph.inserting_before(node):
        parts = [
            None if getattr(norm, name) is None else get_attr(gm, f"{node.target}.{name}", node)
            for name in ("running_mean", "running_var", "weight", "bias")
        ]
        args = (node.args[0], *parts, False, norm.momentum or 0.0, norm.eps)
        bypass(gm, node, call(gm, BATCH_NORM, args, node))
    return 1


PASS = EndTraining()

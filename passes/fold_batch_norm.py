"""fold_batch_norm: a batch norm behind a linear goes into the linear's weight and bias, as often as it can.

    g[n] = gamma[n] / sqrt(var[n] + eps);   w'[n, :] = w[n, :] * g[n];   b'[n] = (b[n] - mean[n]) * g[n] + beta[n]

in float64. Not folded: a norm whose statistics several calls share, a linear that others read, channels that are not
the linear's outputs (batch_norm normalises dimension 1, so the linear's result must be a matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import constant, get_attr, replace, set_constant
from fxq.pattern import Any, Const, Match, Op
from fxq.pipeline import Context, Numbers
from fxq.spelling import BATCH_NORM, LINEAR
from fxq.stages import Stage

PATTERN = Op(
    {BATCH_NORM},
    Op({LINEAR}, Any("x"), Const("w"), Any("b"), name="linear"),
    Const("mean"),
    Const("var"),
    Any("gamma"),
    Any("beta"),
    Any("training"),
    Any("momentum"),
    Any("eps"),
)


@dataclass(frozen=True)
class FoldBatchNorm:
    """See the module's docstring."""

    name: str = "fold-batch-norm"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a norm behind a folded norm is folded as well."""
        return sum(_fold(gm, node) for node in list(gm.graph.nodes) if node.target is BATCH_NORM)


def _fold(gm: GraphModule, norm: Node) -> int:
    match = PATTERN.match(norm)
    if not isinstance(match, Match) or len(norm.meta["value"].shape) != 2 or _shared(gm, match.node("mean")):
        return 0
    if not all(_is_fixed(match[name]) for name in ("w", "b", "mean", "var", "gamma", "beta")):
        return 0

    def value(name: str, default: float) -> Tensor:
        node = match[name]
        if isinstance(node, Node):
            return constant(gm, node).detach().double()
        return torch.full_like(mean, default)

    w, mean = constant(gm, match.node("w")), constant(gm, match.node("mean")).double()
    gain = value("gamma", 1.0) / torch.sqrt(value("var", 1.0) + match["eps"])
    weight = w.detach().double() * gain[:, None]
    bias = (value("b", 0.0) - mean) * gain + value("beta", 0.0)

    linear = match.node("linear")
    path = str(match.node("w").target).removesuffix("_folded")
    with gm.graph.inserting_before(norm):
        folded = [
            get_attr(gm, set_constant(gm, name, tensor.to(w.dtype)), linear)
            for name, tensor in ((f"{path}_folded", weight), (_bias_beside(path), bias))
        ]
    replace(gm, norm, LINEAR, (match["x"], *folded)).meta["origin"] = linear.meta.get("origin")
    return 1


def _is_fixed(operand: object) -> bool:
    """Whether an operand is None, or a constant that nothing modifies."""
    return operand is None or (isinstance(operand, Node) and operand.op == "get_attr" and "aliases" not in operand.meta)


def _bias_beside(weight: str) -> str:
    owner, _, leaf = weight.rpartition(".")
    name = "bias_folded" if leaf == "weight" else f"{leaf}_bias_folded"
    return f"{owner}.{name}" if owner else name


def _shared(gm: GraphModule, statistic: Node) -> bool:
    """Whether several calls normalise with this running mean."""
    readers = [u for n in gm.graph.nodes if n.op == "get_attr" and n.target == statistic.target for u in n.users]
    return len(readers) > 1


PASS = FoldBatchNorm()

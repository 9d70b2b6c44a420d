"""fold_batch_norm: a batch norm beside a linear or convolution goes into its weight and bias, as often as it can.

    g[n] = gamma[n] / sqrt(var[n] + eps);   h[n] = beta[n] - mean[n] * g[n]
    behind       w'[n, ...] = w[n, ...] * g[n];       b'[n] = b[n] * g[n] + h[n]
    before       w'[n, c, ...] = w[n, c, ...] * g[c];  b'[n] = b[n] + sum_c,... w[n, c, ...] * h[c]

in float64. Not folded behind: a norm whose statistics several calls share, a product that others read, channels that
are not the product's outputs (batch_norm normalises dimension 1, so the result of a linear must be a matrix). Not
folded before: where zeros are padded, which the norm would have moved; a norm that others read; transposed products.

For training (`trainable`) a fold must be one that `make_trainable` can take back: a norm that is a module of torch's,
behind a product that has not swallowed one yet. Where it came from is noted in meta `FOLDED`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxq.batch_norm import FOLDED, Folded, folded
from fxq.graph import constant, get_attr, replace, set_constant
from fxq.pattern import Any, Const, Match, Op
from fxq.pipeline import Context, Numbers
from fxq.spelling import BATCH_NORM, CONV_TRANSPOSE, CONVS, LINEAR
from fxq.stages import Stage

_STATISTICS = (
    Const("mean"),
    Const("var"),
    Any("gamma"),
    Any("beta"),
    Any("training"),
    Any("momentum"),
    Any("eps"),
)
_OPERANDS = (Any("x"), Const("w"), Any("b"))
_CONV = (Any("stride"), Any("padding"), Any("dilation"), Any("groups"))
PATTERN = Op({BATCH_NORM}, Op({LINEAR}, *_OPERANDS, name="product"), *_STATISTICS)
_BEHIND = (
    PATTERN,
    Op({BATCH_NORM}, Op(CONVS, *_OPERANDS, *_CONV, name="product"), *_STATISTICS),
    Op(
        {BATCH_NORM},
        Op({CONV_TRANSPOSE}, *_OPERANDS, *map(Any, ("stride", "p", "out", "groups", "dilation")), name="product"),
        *_STATISTICS,
    ),
)
_NORM = Op({BATCH_NORM}, Any("x"), *_STATISTICS, name="norm")
_BEFORE = (Op({LINEAR}, _NORM, Const("w"), Any("b")), Op(CONVS, _NORM, Const("w"), Any("b"), *_CONV))


@dataclass(frozen=True)
class FoldBatchNorm:
    """See the module's docstring."""

    name: str = "fold-batch-norm"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING
    trainable: bool = False

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a norm behind a folded norm is folded as well; what is left, into what reads it."""
        count = sum(self._fold_behind(gm, node) for node in list(gm.graph.nodes) if node.target is BATCH_NORM)
        products = [node for node in gm.graph.nodes if node.target is LINEAR or node.target in CONVS]
        return count + (0 if self.trainable else sum(_fold_before(gm, node) for node in products))

    def _fold_behind(self, gm: GraphModule, norm: Node) -> int:
        match = _first(_BEHIND, norm)
        if match is None or _shared(gm, match.node("mean")):
            return 0
        product = match.node("product")
        if product.target is LINEAR and len(norm.meta["value"].shape) != 2:
            return 0
        path = str(match.node("mean").target).rpartition(".")[0]
        if self.trainable:
            module = gm.get_submodule(path)
            if FOLDED in product.meta or product.target is CONV_TRANSPOSE or not isinstance(module, _BatchNorm):
                return 0
        w, b, mean, var, gamma, beta = (_value(gm, match[name]) for name in ("w", "b", "mean", "var", "gamma", "beta"))
        assert w is not None and mean is not None and var is not None
        new = _replace(gm, norm, product, match, *folded(w, b, mean, var, gamma, beta, match["eps"]))
        if self.trainable:
            parts = (match["w"], match["b"])
            new.meta[FOLDED] = Folded(path, *(None if part is None else str(part.target) for part in parts))
        return 1


def _fold_before(gm: GraphModule, product: Node) -> int:
    match = _first(_BEFORE, product)
    if match is None or len(match.node("norm").meta["value"].shape) != constant(gm, match.node("w")).dim():
        return 0
    if any(match.bound.get("padding", ())):
        return 0
    w, b, mean, var, gamma, beta = (_value(gm, match[name]) for name in ("w", "b", "mean", "var", "gamma", "beta"))
    assert w is not None and mean is not None and var is not None
    groups = match.bound.get("groups", 1)
    if len(mean) != w.shape[1] * groups:
        return 0
    ones = torch.ones(len(mean), 1, dtype=torch.float64)
    gain, shift = folded(ones, None, mean, var, gamma, beta, match["eps"])
    split = w.double().reshape(groups, -1, w.shape[1], w[0, 0].numel())  # [groups, N / groups, C / groups, taps]
    bias = (split * shift.reshape(groups, 1, -1, 1)).sum((2, 3)).flatten() + (0.0 if b is None else b.double())
    weight = (split * gain.reshape(groups, 1, -1, 1)).reshape(w.shape)
    _replace(gm, product, product, match, weight.to(w.dtype), bias.to(w.dtype))
    return 1


def _first(patterns: tuple[Op, ...], node: Node) -> Match | None:
    for pattern in patterns:
        match = pattern.match(node)
        if isinstance(match, Match):
            fixed = all(_is_fixed(match[name]) for name in ("w", "b", "mean", "var", "gamma", "beta"))
            return match if fixed else None
    return None


def _value(gm: GraphModule, operand: Node | None) -> Tensor | None:
    return None if operand is None else constant(gm, operand).detach()


def _replace(gm: GraphModule, node: Node, product: Node, match: Match, weight: Tensor, bias: Tensor) -> Node:
    """Put `product` with another weight and bias, reading what the norm or it read, in the place of `node`."""
    w = match.node("w")
    path = str(w.target).removesuffix("_folded")
    with gm.graph.inserting_before(node):
        constants = [
            get_attr(gm, set_constant(gm, name, tensor), product)
            for name, tensor in ((f"{path}_folded", weight), (_bias_beside(path), bias))
        ]
    assert callable(product.target)
    return replace(gm, node, product.target, (match["x"], *constants, *product.args[3:]), like=product)


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
TRAINABLE = FoldBatchNorm(trainable=True)

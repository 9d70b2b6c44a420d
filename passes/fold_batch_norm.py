"""fold_batch_norm: a batch norm behind a linear goes into the linear's weight and bias, as often as it can.

    g[n] = gamma[n] / sqrt(var[n] + eps);   w'[n, :] = w[n, :] * g[n];   b'[n] = (b[n] - mean[n]) * g[n] + beta[n]

in float64. Not folded: a norm whose statistics several calls share, a linear that others read, channels that are not
the linear's outputs (batch_norm normalises dimension 1, so the linear's result must be a matrix).

For training (`trainable`) a fold must be one that `make_trainable` can take back: a norm that is a module of torch's,
behind a linear that has not swallowed one yet. Where it came from is noted in meta `FOLDED`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxq.batch_norm import FOLDED, Folded, folded
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
    trainable: bool = False

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """In graph order, so that a norm behind a folded norm is folded as well."""
        return sum(self._fold(gm, node) for node in list(gm.graph.nodes) if node.target is BATCH_NORM)

    def _fold(self, gm: GraphModule, norm: Node) -> int:
        match = PATTERN.match(norm)
        if not isinstance(match, Match) or len(norm.meta["value"].shape) != 2 or _shared(gm, match.node("mean")):
            return 0
        operands = [match[name] for name in ("w", "b", "mean", "var", "gamma", "beta")]
        linear = match.node("linear")
        path = str(match.node("mean").target).rpartition(".")[0]
        if not all(_is_fixed(operand) for operand in operands):
            return 0
        if self.trainable and (FOLDED in linear.meta or not isinstance(gm.get_submodule(path), _BatchNorm)):
            return 0

        w, b, mean, var, gamma, beta = (_value(gm, operand) for operand in operands)
        assert w is not None and mean is not None and var is not None
        weight, bias = folded(w, b, mean, var, gamma, beta, match["eps"])
        stem = str(match.node("w").target).removesuffix("_folded")
        with gm.graph.inserting_before(norm):
            constants = [
                get_attr(gm, set_constant(gm, name, tensor), linear)
                for name, tensor in ((f"{stem}_folded", weight), (_bias_beside(stem), bias))
            ]
        new = replace(gm, norm, LINEAR, (match["x"], *constants))
        new.meta["origin"] = linear.meta.get("origin")
        if self.trainable:
            new.meta[FOLDED] = Folded(path, *(None if o is None else str(o.target) for o in operands[:2]))
        return 1


def _value(gm: GraphModule, operand: Node | None) -> Tensor | None:
    return None if operand is None else constant(gm, operand).detach()


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

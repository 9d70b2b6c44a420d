"""functionalize: an in-place operation becomes its out-of-place one where nobody can see the difference.

    y.relu_(); y += x; return y, with y a result of the graph  -> y2 = y.relu(); y3 = y2 + x; return y3

It cannot where the memory is an input's or a parameter's, or is read later through a view. Then every node that holds
the memory is marked: meta["aliases"] names the node that modifies it, and later passes leave such nodes as they are.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import constant, is_state, is_tensor, mutations, submodule
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage
from fxq.tracing import mutate

METHODS = {
    *("abs", "add", "addcdiv", "addcmul", "ceil", "clamp", "clamp_max", "clamp_min", "clip", "cos", "div", "divide"),
    *("erf", "exp", "expm1", "floor", "lerp", "log", "log1p", "masked_fill", "mul", "multiply", "neg", "negative"),
    *("pow", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sin", "sqrt", "square", "sub", "subtract", "tanh"),
    *("tril", "triu", "true_divide", "where"),
}
"""Methods of a tensor that are the same out of place: `name_` and `name`."""
OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    **{getattr(torch, f"{name}_"): getattr(torch, name) for name in METHODS if hasattr(torch, f"{name}_")},
    F.relu_: F.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.celu_: F.celu,
    F.selu_: F.selu,
}
"""Functions in place, and out of place."""
OPTIONAL = frozenset(
    {
        *(F.relu, F.relu6, F.hardtanh, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.celu),
        *(F.selu, F.threshold),
    }
)
"""Functions with an argument `inplace`."""
MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.CELU: (F.celu, ("alpha",)),
    nn.SELU: (F.selu, ()),
    nn.Threshold: (F.threshold, ("threshold", "value")),
}
"""Modules that may work in place: their function and its further operands."""


@dataclass(frozen=True)
class Functionalize:
    """See the module's docstring."""

    name: str = "functionalize"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of operations that work out of place now."""
        examples = ctx.examples.clone()
        mutated = mutations(gm, examples.args, examples.kwargs)
        for node in gm.graph.find_nodes(op="get_attr"):
            if is_state(gm, constant(gm, node)):
                node.meta["aliases"] = node.name
        return sum(_functionalize(gm, node, held) for node, held in mutated.items())


def _functionalize(gm: GraphModule, node: Node, held: tuple[Node, ...]) -> bool:
    """Write `node` out of place and let later readers of its operand read it; or mark all that share the memory."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    target = node.args[0] if node.args else None
    others = [n for n in held if n is not target]
    unseen = not any(order[user] > order[node] for n in others for user in n.users) and all(map(_computed, held))
    if isinstance(target, Node) and unseen and _keeps_dtype(node) and _write_out_of_place(gm, node):
        target.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
        return True
    for n in (*held, node):
        n.meta["aliases"] = node.name
    return False


def _computed(node: Node) -> bool:
    return node.op not in ("placeholder", "get_attr")


def _keeps_dtype(node: Node) -> bool:
    """Whether the result has the dtype of the first operand out of place too, where the widest operand decides it."""
    kinds = [n.meta["value"].dtype for n in node.all_input_nodes if is_tensor(n)]
    return kinds[0].is_floating_point and all(k == kinds[0] or not (k.is_floating_point or k.is_complex) for k in kinds)


def _write_out_of_place(gm: GraphModule, node: Node) -> bool:
    """Turn `node` into its out-of-place spelling; whether there is one."""
    if node.target is mutate:
        tensor, method, *rest = node.args
        if not isinstance(tensor, Node) or str(method).removesuffix("_") not in METHODS:
            return False
        node.op, node.target, node.args = "call_method", str(method).removesuffix("_"), (tensor, *rest)
        node.meta["value"] = tensor.meta["value"]
        return True
    if node.op == "call_module":
        module = submodule(gm, node)
        if type(module) not in MODULES:
            return False
        function, options = MODULES[type(module)]
        node.op, node.target = "call_function", function
        node.args = (*node.args, *(getattr(module, name) for name in options))
        return True
    if node.op == "call_method":
        name = str(node.target)
        name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
        if name == node.target or name.strip("_") not in METHODS:
            return False
        node.target = name
        return True
    if node.target in OPERATORS:
        node.target = OPERATORS[node.target]
        return True
    if node.target in OPTIONAL:
        assert callable(node.target)
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.arguments.pop("inplace")
        node.args, node.kwargs = (), bound.arguments
        node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}
        return True
    return False


PASS = Functionalize()

"""Functions of one tensor, number by number, however many operations they are written with.

    gelu(x)    x * sigmoid(1.702 * x)    where(x > 0, x, 0.1 * x)    (x - 3).clamp(0, 6) / 6    x * gamma[c]

`span_of` finds the operations between such a function's result and the tensor that it is of. On integers of 256 values
it is a table (`fxq.ops.lookup`), made by running those very operations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxq.double import Double, narrowed
from fxq.graph import constant, is_float_tensor, is_tensor, submodule
from fxq.spelling import float_bounds

_NAMES = (
    *(
        "abs",
        "absolute",
        "neg",
        "negative",
        "positive",
        "sign",
        "sgn",
        "floor",
        "ceil",
        "round",
        "trunc",
        "fix",
        "frac",
    ),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "pow"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinc", "deg2rad", "rad2deg"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "arcsinh", "arccosh", "arctanh"),
    *("erf", "erfc", "sigmoid", "logit", "relu", "selu", "celu", "prelu", "threshold", "hardshrink"),
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide"),
    *(
        "remainder",
        "fmod",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "atan2",
        "hypot",
        "copysign",
        "logaddexp",
        "heaviside",
    ),
    *("clamp", "clip", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "where", "masked_fill", "nan_to_num"),
    *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal"),
    *("logical_and", "logical_or", "logical_not", "logical_xor", "isnan", "isinf", "isfinite", "signbit"),
)
_OPERATORS: tuple[str, ...] = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "neg",
    "pos",
    "abs",
    "gt",
    "ge",
    "lt",
    "le",
)
_OPERATORS += ("eq", "ne", "and_", "or_", "xor", "invert")
_ACTIVATIONS: tuple[str, ...] = (
    "relu",
    "relu6",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "silu",
    "mish",
    "gelu",
    "elu",
    "celu",
    "selu",
)
_ACTIVATIONS += ("leaky_relu", "prelu", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "threshold")
_ACTIVATIONS += ("logsigmoid", "sigmoid", "tanh")

FUNCTIONS = frozenset(
    {
        *(getattr(torch, name) for name in _NAMES if hasattr(torch, name)),
        *(getattr(torch.special, name) for name in _NAMES if hasattr(torch.special, name)),
        *(getattr(operator, name) for name in _OPERATORS),
        *(getattr(F, name) for name in _ACTIVATIONS),
        torch.special.expit,
    }
)
METHODS = frozenset(
    {"float", *_NAMES, *(f"__{name.strip('_')}__" for name in _OPERATORS), "__radd__", "__rsub__", "__rmul__"}
)
METHODS |= {"__rtruediv__", "__rpow__"}
MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.GELU, nn.ELU, nn.CELU),
        *(nn.SELU, nn.LeakyReLU, nn.PReLU, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
        *(nn.Threshold, nn.LogSigmoid, nn.Sigmoid, nn.Tanh),
    }
)
"""Operations whose result at one place is a function of their operands at that place, always the same one."""


_LONGEST = 64
"""Operations; looking further back would take more time than it saves."""


_BOUNDED = frozenset({"sigmoid", "hardsigmoid", "tanh", "softsign", "erf"})


def is_bounded(gm: GraphModule, node: Node) -> bool:
    """Whether `node` is between -1 and 1 whatever it reads."""
    if node.op == "call_module":
        return type(submodule(gm, node)) in (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign)
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _BOUNDED


@dataclass(frozen=True)
class Span:
    """A function of one tensor: its operations in order, the last its result, and the tensor `source`.

    dim: the dimension of `source` along which the function differs, from channel to channel; None where it does not.
    """

    source: Node
    nodes: tuple[Node, ...]
    dim: int | None = None

    @property
    def root(self) -> Node:
        """The function's result."""
        return self.nodes[-1]

    def inner(self) -> tuple[Node, ...]:
        """The operations before the last that nothing outside reads, those that make constants for them included."""
        inside = set(self.nodes)
        makers = {n for node in self.nodes for n in node.all_input_nodes if _is_constant(n) and n.op != "get_attr"}
        return tuple(node for node in (*self.nodes[:-1], *makers) if inside.issuperset(node.users))

    def table(self, gm: GraphModule, values: Tensor) -> Tensor:
        """The function of each of `values` (float32 [V]): [V], or [C, V] where it differs along `dim`.

        Computed in float64 and rounded to float32 once, so that it is the same on every machine.
        """
        shape = self.source.meta["value"].shape
        x = values
        if self.dim is not None:
            sizes = [shape[self.dim] if d == self.dim else 1 for d in range(len(shape))]
            x = values.view(-1, *[1] * (len(shape) - 1)).repeat(sizes)
        env: dict[Node, Any] = {self.source: x}
        for node in self.nodes:
            for operand in node.all_input_nodes:
                if operand not in env:
                    env[operand] = constant(gm, operand) if operand.op == "get_attr" else _run(gm, operand, env)
            env[node] = _run(gm, node, env)
        y: Tensor = narrowed(env[self.root].detach())
        return y if self.dim is None else y.movedim(self.dim, 0).flatten(1).contiguous()


def _run(gm: GraphModule, node: Node, env: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    with torch.no_grad(), Double():
        if node.op == "call_module":
            return submodule(gm, node)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def span_of(gm: GraphModule, root: Node) -> Span | None:
    """The longest function of one float32 tensor whose result is `root`; None where it is none.

    It reaches back as far as nothing else reads what lies between. A relu or clamp that begins it stays out: the
    operation before takes that in, and its integers then spend no values on what is cut off.
    """
    found: Span | None = None
    for source in _sources(gm, root) if is_float_tensor(root) else ():
        span = _span(gm, source, root)
        if span is None or (found is not None and not set(span.nodes[:-1]).issubset(span.inner())):
            break
        found = span
    while found is not None and _begins_with_clamp(found):
        source, *nodes = found.nodes
        found = Span(source, tuple(nodes), found.dim) if nodes else None
    return found


def _begins_with_clamp(span: Span) -> bool:
    first, *others = span.nodes
    return float_bounds(first) is not None and not any(span.source in node.all_input_nodes for node in others)


def _sources(gm: GraphModule, root: Node) -> list[Node]:
    """The values that each way to `root` through elementwise operations goes through, the last first."""
    inside, border = [root] if _is_elementwise(gm, root, root) else [], set[Node]()
    for node in inside:  # grows while it is walked through
        for operand in _operands(node):
            if operand in inside:
                continue
            if len(inside) < _LONGEST and _is_elementwise(gm, operand, root):
                inside.append(operand)
            else:
                border.add(operand)
    through: dict[Node, set[Node]] = {node: {node} for node in border}
    for node in sorted(inside, key=lambda node: node._sort_key):
        operands = [through[operand] for operand in _operands(node)]
        through[node] = {node}.union(set.intersection(*operands) if operands else ())
    return sorted(through.get(root, set()) - {root}, key=lambda node: node._sort_key, reverse=True)


def _span(gm: GraphModule, source: Node, root: Node) -> Span | None:
    """The operations from `source` to `root`, where they are a function of one number, and of its channel at most."""
    inside = [root]
    for node in inside:
        inside += [operand for operand in _operands(node) if operand is not source and operand not in inside]
    if not is_float_tensor(source) or not _same_shape(source, root):
        return None
    dims = {dim for node in inside for dim in _dims(gm, node)}
    if len(dims) > 1 or not all(dims):  # 0 is the batch
        return None
    return Span(source, tuple(sorted(inside, key=lambda node: node._sort_key)), next(iter(dims), None))


def _is_elementwise(gm: GraphModule, node: Node, root: Node) -> bool:
    """Whether `node` computes, on the examples, one number of the shape of `root` from one number each."""
    known = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, frozenset[Any]())
    if node.op == "call_module":
        if type(submodule(gm, node)) not in MODULES:
            return False
    elif node.target not in known:
        return False
    if "aliases" in node.meta or "out" in node.kwargs or not _same_shape(node, root):
        return False
    operands = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    return bool(_operands(node)) and all(
        (is_tensor(operand) and "aliases" not in operand.meta) if isinstance(operand, Node) else True
        for operand in operands
    )


def _operands(node: Node) -> list[Node]:
    """What an operation reads but for constants."""
    return [operand for operand in node.all_input_nodes if not _is_constant(operand)]


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr" or (node.target is torch.tensor and not node.all_input_nodes)


def _same_shape(node: Node, root: Node) -> bool:
    return is_tensor(node) and node.meta["value"].shape == root.meta["value"].shape


def _dims(gm: GraphModule, node: Node) -> Iterator[int]:
    """The dimensions of a node's value along which its constants differ."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    module = submodule(gm, node) if node.op == "call_module" else None
    if isinstance(module, nn.PReLU):
        if module.weight.numel() > 1:
            yield 1
        return
    rank = len(node.meta["value"].shape)
    for operand in node.all_input_nodes:
        if _is_constant(operand):
            shape = operand.meta["value"].shape
            if name == "prelu":
                yield from (1 for size in shape if size > 1)
            else:
                yield from (d + rank - len(shape) for d, size in enumerate(shape) if size > 1)

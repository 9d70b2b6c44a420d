"""norm: layer norm or RMS norm over the last dimension, in float32, with the quantize behind it in the same pass.

    layer_norm          y = (x - m) / sqrt(mean((x - m)**2) + eps) * weight + bias,  m = mean(x)
    rms_norm            y = x / sqrt(mean(x**2) + eps) * weight + bias
    norm                y                                                                          -> float32
    norm_quantize       quantize(y [* factor], scale, zero_point)                                  -> uint8
    norm_and_quantize   both: a residual reads the float32, the next products the uint8            -> float32, uint8

x: float32 [..., K]; weight, bias, factor: float32 [K] or None. Sums, square root and division are plain float32 steps
in a fixed order, so every instruction set and NumPy agree bit for bit; NumPy truth, order and error:
`fxq.numerics.layer_norm`, `rms_norm`, `norm_quantize`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, submodule
from fxq.qdq import expect_dtype
from fxq.spelling import ADD, MEAN


def _norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if kind not in numerics.NORMS:
        raise ValueError(f"fxq: unknown norm {kind!r}; there are {', '.join(numerics.NORMS)}")
    expect_dtype("norm", "x", x, torch.float32)
    w, b = _row("weight", weight, x), _row("bias", bias, x)
    return torch.from_numpy(np.ascontiguousarray(numerics.NORMS[kind](x.numpy(), w, b, eps)))


def _row(name: str, row: Tensor | None, x: Tensor) -> numerics.F32 | None:
    if row is None:
        return None
    expect_dtype("norm", name, row, torch.float32)
    if row.shape != x.shape[-1:]:
        raise ValueError(f"fxq::norm: {name} has shape {list(row.shape)}, x {list(x.shape)}")
    values: numerics.F32 = row.numpy()
    return values


def _norm_and_quantize(
    x: Tensor,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _row("factor", factor, x)
    y = _norm(x, kind, weight, bias, eps)
    q: Tensor = kernels.portable("quantize")(y if factor is None else y * factor, scale, zero_point)
    return y, q


_OPERANDS = "Tensor x, str kind, Tensor? weight, Tensor? bias, float eps"
_QUANTIZE = "float scale, int zero_point, Tensor? factor=None"

norm = kernels.define(
    f"norm({_OPERANDS}) -> Tensor",
    _norm,
    lambda x, kind, weight, bias, eps: x.new_empty(x.shape),
)
norm_quantize = kernels.define(
    f"norm_quantize({_OPERANDS}, {_QUANTIZE}) -> Tensor",
    lambda *operands: _norm_and_quantize(*operands)[1],
    lambda x, *rest: x.new_empty(x.shape, dtype=torch.uint8),
)
norm_and_quantize = kernels.define(
    f"norm_and_quantize({_OPERANDS}, {_QUANTIZE}) -> (Tensor, Tensor)",
    _norm_and_quantize,
    lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.uint8)),
)


@dataclass(frozen=True)
class Call:
    """A norm that someone wrote: the node that ends it, its operands, and the nodes that are parts of it.

    weight, bias: a node, the path of a parameter, or None.
    """

    x: Node
    kind: str
    weight: Node | str | None
    bias: Node | str | None
    eps: float
    parts: tuple[Node, ...] = ()


def norm_of(gm: GraphModule, node: Node) -> Call | None:
    """The norm that ends at a float node: nn.LayerNorm, nn.RMSNorm, their functions, or a hand-written RMS norm.

    None for another operation, and for a norm over more than the last dimension or of another type than float32.
    """
    found = _by_module(gm, node) if node.op == "call_module" else _by_function(node) or _by_hand(node)
    if found is None or not is_float_tensor(found.x) or not is_float_tensor(node):
        return None
    shape = found.x.meta["value"].shape
    for row in (found.weight, found.bias):
        if isinstance(row, Node) and not (is_float_tensor(row) and row.meta["value"].shape == shape[-1:]):
            return None
    return found if shape else None


def _by_module(gm: GraphModule, node: Node) -> Call | None:
    module, x = submodule(gm, node), next(iter((*node.args, *node.kwargs.values())), None)
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module) not in (nn.LayerNorm, nn.RMSNorm):
        return None
    if len(module.normalized_shape) != 1 or not isinstance(x, Node):
        return None
    rows = (getattr(module, name, None) for name in ("weight", "bias"))
    if any(row is not None and row.dtype != torch.float32 for row in (module.weight, getattr(module, "bias", None))):
        return None
    weight, bias = (
        f"{node.target}.{name}" if row is not None else None for name, row in zip(("weight", "bias"), rows, strict=True)
    )
    kind = "layer_norm" if type(module) is nn.LayerNorm else "rms_norm"
    return Call(x, kind, weight, bias, _eps(module.eps))


def _eps(eps: float | None) -> float:
    return torch.finfo(torch.float32).eps if eps is None else eps


_FUNCTIONS = {F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm", F.rms_norm: "rms_norm"}
_FUNCTIONS |= {torch.rms_norm: "rms_norm"}


def _by_function(node: Node) -> Call | None:
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if kind is None:
        return None

    def operands(
        input: object, normalized_shape: object, weight: object = None, bias: object = None, eps: object = 1e-5
    ) -> tuple[object, ...]:
        return input, normalized_shape, weight, bias, eps

    def rms_operands(
        input: object, normalized_shape: object, weight: object = None, eps: object = None
    ) -> tuple[object, ...]:
        return input, normalized_shape, weight, None, eps

    kwargs = {name: value for name, value in node.kwargs.items() if name != "cudnn_enable"}
    x, shape, weight, bias, eps = (operands if kind == "layer_norm" else rms_operands)(*node.args[:5], **kwargs)
    one = isinstance(shape, list | tuple) and len(shape) == 1
    if not one or not isinstance(x, Node) or not isinstance(eps, float | int | None):
        return None
    if not all(isinstance(row, Node | None) for row in (weight, bias)):
        return None
    return Call(x, kind, weight, bias, _eps(eps))  # type: ignore[arg-type]


def _by_hand(node: Node) -> Call | None:
    """weight * (x * rsqrt(mean(x**2, -1, keepdim) + eps)), as the Llama family has it; weight may stand on any side."""
    scaled = _product(node)
    for normal, weight in scaled:
        found = _unscaled(normal)
        if found is not None and weight.op == "get_attr" and len(normal.users) == 1:
            return Call(found.x, found.kind, weight, None, found.eps, (*found.parts, normal))
    return _unscaled(node)


def _product(node: object) -> list[tuple[Node, Node]]:
    """Both orders of the operands of a product of two tensors."""
    if isinstance(node, Node) and _calls(node, "mul") and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        if isinstance(a, Node) and isinstance(b, Node):
            return [(a, b), (b, a)]
    return []


def _unscaled(node: Node) -> Call | None:
    for x, inverse in _product(node):
        eps = _inverse_root(x, inverse)
        if eps is not None:
            parts = []
            while inverse is not x:
                parts.append(inverse)
                source = inverse.args[0]
                assert isinstance(source, Node)
                inverse = source
            return Call(x, "rms_norm", None, None, eps, tuple(parts))
    return None


def _inverse_root(x: Node, node: Node) -> float | None:
    """eps, where `node` is rsqrt(mean(x**2, (last,), True) + eps) and no one else reads what is inside."""
    chain = [node]
    for _ in range(3):
        source = chain[-1].args[0] if chain[-1].args else None
        if not isinstance(source, Node) or any(len(n.users) != 1 for n in chain):
            return None
        chain.append(source)
    root, shifted, mean, square = chain
    if not _calls(root, "rsqrt") or shifted.target is not ADD or not isinstance(shifted.args[1], float):
        return None
    if mean.target is not MEAN or mean.args[1:] != ((len(x.meta["value"].shape) - 1,), True):
        return None
    if len(square.users) != 1 or square.args[0] is not x:
        return None
    squares = (_calls(square, "square") and len(square.args) == 1) or (_calls(square, "pow") and square.args[1] == 2)
    return shifted.args[1] if squares or (_calls(square, "mul") and square.args == (x, x)) else None


def _calls(node: Node, name: str) -> bool:
    """Whether `node` calls the tensor method, the function of torch or the operator of this name."""
    if node.op == "call_method":
        return node.target == name
    return node.op == "call_function" and node.target in (getattr(torch, name), getattr(operator, name, None))


@dataclass(frozen=True)
class NormFamily(Family):
    """Norms: float32 by nature, in an op of fxq's own (`passes.fuse_norm`) unless the recipe keeps them torch's."""

    name: str = "norm"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A refusal that says so."""
        if node.op not in ("call_module", "call_function") or norm_of(gm, node) is None:
            return None
        return Refusal(Reason.OWN_FLOAT)


FAMILY = NormFamily()

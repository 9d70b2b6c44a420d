"""normalize_linears: one spelling for every linear with a constant weight, and for the tables that share it.

nn.Linear, F.linear(weight=...), addmm, x @ w.t()    -> linear(x, weight, bias)
nn.Embedding                                         -> embedding(ids, weight, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import constant, get_attr, replace, set_constant
from fxq.pipeline import Context, Numbers
from fxq.rewriting import Parameter, Rewrite, Rules, fits, rank, swaps_matrix
from fxq.spelling import LINEAR
from fxq.stages import Stage


def _linear(input: Any, weight: Any, bias: Any = None) -> Rewrite:
    return LINEAR, (input, weight, bias)


def _linear_module(m: Any, x: Any, parameter: Parameter) -> Rewrite:
    return _linear(x, parameter("weight"), parameter("bias"))


def _embedding_module(m: Any, x: Any, parameter: Parameter) -> Rewrite | None:
    if m.max_norm is not None:
        return None
    return F.embedding, (x, parameter("weight"), m.padding_idx, None, m.norm_type, m.scale_grad_by_freq, m.sparse)


def _matmul(input: Any, other: Any) -> tuple[Any, Any, Any]:
    return None, input, other


def _mm(input: Any, mat2: Any) -> tuple[Any, Any, Any]:
    return None, input, mat2


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> tuple[Any, Any, Any] | None:
    return (input, mat1, mat2) if (beta, alpha) == (1, 1) else None


RULES = Rules({F.linear: _linear}, {}, {nn.Linear: _linear_module, nn.Embedding: _embedding_module}, own_memory=True)
PRODUCTS: dict[object, Callable[..., tuple[Any, Any, Any] | None]] = {
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.addmm: _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _mm,
    "addmm": _addmm,
}
"""Products of matrices: each gives (bias, x, w)."""


def _linear_from_product(gm: GraphModule, node: Node) -> int:
    """x @ w, mm and addmm with a constant two-dimensional w [K, N] are a linear with the weight w.t() [N, K].

    The transposed weight is a view, so the same BLAS call computes the same bits.
    """
    spelling = PRODUCTS[node.target]
    operands = spelling(*node.args, **node.kwargs) if fits(spelling, node) else None
    if operands is None:
        return 0
    bias, x, w = operands
    path = _transposed(gm, w) if isinstance(w, Node) else None
    if path is None or not (bias is None or _is_bias(gm, bias, columns=w)):
        return 0
    with gm.graph.inserting_before(node):
        weight = get_attr(gm, path, node)
    replace(gm, node, LINEAR, (x, weight, bias))
    return 1


def _is_bias(gm: GraphModule, bias: object, columns: object) -> bool:
    """Whether `bias` is a constant with one number for each column of the matrix `columns`."""
    assert isinstance(columns, Node)
    width = columns.meta["value"].shape[-1]
    return isinstance(bias, Node) and bias.op == "get_attr" and constant(gm, bias).shape == (width,)


def _transposed(gm: GraphModule, w: Node) -> str | None:
    """The path of a constant that is the transpose of `w`; None where `w` is not a constant matrix."""
    source = w.args[0] if swaps_matrix(w) else w
    if not isinstance(source, Node) or source.op != "get_attr" or rank(source) != 2 or "aliases" in source.meta:
        return None
    if source is not w:
        return str(source.target)
    path, tensor = f"{w.target}_t", constant(gm, w).detach().t()
    owner, _, name = path.rpartition(".")
    known = getattr(gm.get_submodule(owner), name, None)
    if isinstance(known, Tensor) and known.data_ptr() == tensor.data_ptr() and known.stride() == tensor.stride():
        return path
    return set_constant(gm, path, tensor)


@dataclass(frozen=True)
class NormalizeLinears:
    """See the module's docstring."""

    name: str = "normalize-linears"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten."""
        return RULES.apply(gm) + sum(
            _linear_from_product(gm, node) for node in list(gm.graph.nodes) if node.target in PRODUCTS
        )


PASS = NormalizeLinears()

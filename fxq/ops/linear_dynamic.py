"""linear_dynamic: a linear whose rows find their own scale and zero point as it runs; float32 in, float32 out.

    s[m], z[m] = scale and zero point of the range of x[m, :] and 0                         `numerics.row_qparams`
    q[m, k]    = clamp(rne(f32(x[m, k] * f32(1 / s[m]))) + z[m], 0, 255)
    y[m, n]    = f32(f32(acc - z[m] * column_sums[n]) * f32(s[m] * scale[n])), acc = sum_k q[m, k] * q_w[n, k], exact
    then, each rounded once and where given: + bias[n], + addend, clamp to [low, high], the activation

x: float32 [..., K]; weight: int8, packed; column_sums: int32 [N], sum_k q_w[n, k]; scale, bias: float32 [N]; addend:
float32 [N] or a shape that broadcasts with [..., N]; K <= 66311. No row depends on another, so nothing that shares a
batch changes an answer; a row that holds NaN or infinity becomes NaN. NumPy truth: `fxq.numerics.qlinear_dynamic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.family import Family
from fxq.graph import constant, get_attr, replace
from fxq.packing import packed_constant, shared_constant, sibling, unpack
from fxq.pattern import Any, Const, Match, Op
from fxq.qdq import dequantize_weight, expect_dtype, fake_quantize_rows
from fxq.spelling import LINEAR


def _qlinear_dynamic(
    x: Tensor,
    weight: Tensor,
    column_sums: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    activation: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    op = "qlinear_dynamic"
    expect_dtype(op, "x", x, torch.float32)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "column_sums", column_sums, torch.int32)
    expect_dtype(op, "scale", scale, torch.float32)
    if activation not in ("", *numerics.ACTIVATIONS):
        raise ValueError(f"fxq: unknown activation {activation!r}; there are {', '.join(numerics.ACTIVATIONS)}")
    if scale.shape != column_sums.shape:
        raise ValueError(f"fxq::{op}: scale has shape {list(scale.shape)}, column_sums {list(column_sums.shape)}")
    for name, operand in (("bias", bias), ("addend", addend)):
        if operand is not None:
            expect_dtype(op, name, operand, torch.float32)
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"fxq::{op}: bias has shape {list(bias.shape)}, scale {list(scale.shape)}")
    if addend is not None and addend.dim() and addend.shape[-1] not in (1, len(scale)):
        raise ValueError(f"fxq::{op}: addend has shape {list(addend.shape)}, the result {len(scale)} channels")
    y = numerics.qlinear_dynamic(
        x.detach().numpy(),
        unpack(weight, len(scale), x.shape[-1]).numpy(),
        scale.numpy(),
        None if bias is None else bias.detach().numpy(),
        None if addend is None else addend.detach().numpy(),
        activation,
        low,
        high,
    )
    return torch.from_numpy(np.ascontiguousarray(y))


def _shape(x: Tensor, n: int, addend: Tensor | None) -> torch.Size:
    shape = torch.Size([*x.shape[:-1], n])
    return shape if addend is None else torch.broadcast_shapes(shape, addend.shape)  # type: ignore[no-untyped-call]


qlinear_dynamic = kernels.define(
    "qlinear_dynamic(Tensor x, Tensor weight, Tensor column_sums, Tensor scale, Tensor? bias=None, "
    'Tensor? addend=None, str activation="", float? low=None, float? high=None) -> Tensor',
    _qlinear_dynamic,
    lambda x, weight, column_sums, scale, bias=None, addend=None, activation="", low=None, high=None: x.new_empty(
        _shape(x, len(scale), addend)
    ),
)

_PATTERN = Op(
    {LINEAR},
    Op({fake_quantize_rows}, Any("x"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Any("bias"),
)


@dataclass(frozen=True)
class LinearDynamic(Family):
    """The form of a linear in the scheme "w8a8-dynamic"; it is the family `linear` that claims it."""

    name: str = "linear_dynamic"

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """linear(fake_quantize_rows(x), dequantize_weight(w, s_w), b) -> qlinear_dynamic(x, w, column_sums, s_w, b)."""
        match = _PATTERN.match(node)
        if not isinstance(match, Match):
            return False
        path = str(match.node("w").target)
        w, s_w = (constant(gm, match.node(name)).numpy() for name in ("w", "s_w"))
        scale = np.ascontiguousarray(np.broadcast_to(s_w, len(w)))
        column_sums = w.astype(np.int32).sum(axis=1, dtype=np.int32)
        with gm.graph.inserting_before(node):
            constants = (
                packed_constant(gm, path, w),
                shared_constant(gm, sibling(path, "column_sums"), torch.from_numpy(column_sums)),
                shared_constant(gm, sibling(path, "weight_scale"), torch.from_numpy(scale.copy())),
            )
            operands = (match["x"], *(get_attr(gm, path, node) for path in constants))
        replace(gm, node, qlinear_dynamic, operands if match["bias"] is None else (*operands, match["bias"]))
        return True


FAMILY = LinearDynamic()

"""lookup: any function of one integer, by a table of its 256 results.

    lookup            y = table[q]                                                        uint8 -> uint8 or float32
    lookup_channels   y = table[c, q], c the index along a dimension                      uint8 -> uint8 or float32

table: uint8 or float32 [256], or [C, 256]. For a function f of real numbers, on integers with scale s_x and zero point
z_x, it is

    table[q] = quantize(f(dequantize(q, s_x, z_x)), s_y, z_y),  or  f(dequantize(q, s_x, z_x))

computed once by f's own operations in float64 and rounded to float32, so that it is the same wherever it is computed;
at a byte or two per clock cycle and number at worst. NumPy truth: `fxq.numerics.lookup`, `lookup_channels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.decisions import Reason
from fxq.elementwise import Span, span_of
from fxq.family import Claim, Family, Refusal
from fxq.graph import get_attr, module_of, replace, set_constant
from fxq.layout import laid_like
from fxq.qdq import dequantize, expect_dtype, quantize

MAX_CHANNELS = 1024
"""The most tables of one operation: they fill 256 KiB, and more would not stay in a processor's second cache."""


def _expect(op: str, q: Tensor, table: Tensor, shape: tuple[int, ...]) -> None:
    expect_dtype(op, "q", q, torch.uint8)
    if table.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"fxq::{op}: table has dtype {table.dtype}, expected torch.uint8 or torch.float32")
    if table.shape != shape:
        raise ValueError(f"fxq::{op}: table has shape {list(table.shape)}, expected {list(shape)}")


def _lookup(q: Tensor, table: Tensor) -> Tensor:
    _expect("lookup", q, table, (256,))
    return laid_like(table[q.long()], q)


def _laid(y: Tensor, q: Tensor, dim: int) -> Tensor:
    """Channels-last where q is and its channels are what `dim` names."""
    return laid_like(y, q) if dim == 1 else y.contiguous()


def _lookup_channels(q: Tensor, table: Tensor, dim: int) -> Tensor:
    if not 0 <= dim < q.dim():
        raise ValueError(f"fxq::lookup_channels: dim = {dim}, q has shape {list(q.shape)}")
    _expect("lookup_channels", q, table, (q.shape[dim], 256))
    channels = torch.arange(q.shape[dim]).view(-1, *[1] * (q.dim() - 1 - dim))
    return _laid(table[channels, q.long()], q, dim)


lookup = kernels.define(
    "lookup(Tensor q, Tensor table) -> Tensor",
    _lookup,
    lambda q, table: laid_like(q.new_empty(q.shape, dtype=table.dtype), q),
)
lookup_channels = kernels.define(
    "lookup_channels(Tensor q, Tensor table, int dim) -> Tensor",
    _lookup_channels,
    lambda q, table, dim: _laid(q.new_empty(q.shape, dtype=table.dtype), q, dim),
)


@dataclass(frozen=True)
class Lookup(Family):
    """A function of one float32 tensor, number by number, in any number of operations (`fxq.elementwise`)."""

    name: str = "lookup"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """All operations back to the one tensor that they are a function of; clamps alone have no need of a table."""
        span = span_of(gm, node)
        if span is None:
            return None
        channels = 1 if span.dim is None else span.source.meta["value"].shape[span.dim]
        if channels > MAX_CHANNELS:
            return Refusal(Reason.UNPROFITABLE, f"it differs from channel to channel, of which there are {channels}")
        return Claim("pointwise", (span.source,), inner=span.inner(), to_float=True)

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(f(dequantize(q))) -> lookup into uint8; f(dequantize(q)) of which nothing does -> into float32."""
        root = node.args[0] if node.target is quantize else node
        span = span_of(gm, root) if isinstance(root, Node) else None
        if span is None or span.source.target is not dequantize:
            return False
        q, scale, zero_point = span.source.args
        assert isinstance(q, Node) and isinstance(scale, float) and isinstance(zero_point, int)
        table = span.table(gm, dequantize(torch.arange(256, dtype=torch.uint8), scale, zero_point))
        qparams = None
        if node.target is quantize:
            s_y, z_y = node.args[1:]
            assert isinstance(s_y, float) and isinstance(z_y, int)
            qparams, table = (s_y, z_y), quantize(table, s_y, z_y)
        _replace(gm, node, span, q, table, qparams)
        return True


def _replace(
    gm: GraphModule, node: Node, span: Span, q: Node, table: Tensor, qparams: tuple[float, int] | None
) -> None:
    with gm.graph.inserting_before(node):
        entries = get_attr(gm, set_constant(gm, f"{module_of(span.root)}.table".lstrip("."), table), span.root)
    if span.dim is None:
        replace(gm, node, lookup, (q, entries), qparams, like=span.root)
    else:
        replace(gm, node, lookup_channels, (q, entries, span.dim), qparams, like=span.root)


FAMILY = Lookup()

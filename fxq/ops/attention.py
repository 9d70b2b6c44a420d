"""attention: y = softmax(q k^T * scale + mask) v, both products in integers and the softmax between them in one op.

    acc[t, s] = sum_d (q[t, d] - z_q) * (k[s, d] - 128)                                                exact int32
    x[t, s]   = f32(acc * f32(s_q * s_k * scale)) [+ mask]                                -inf where a key is masked
    i[t, s]   = min(rne((max_s x[t, s] - x[t, s]) * 255 / (9 ln 2)), 255)                              uint8
    p[t, s]   = rne(255 * 2**(-9 i[t, s] / 255))                                          a table of 256 uint8
    y[t, e]   = f32(sum_s p[t, s] * (v[s, e] - z_v)) * f32(m_v / f32(sum_s p[t, s]))
    qattention        q_y = clamp(rne(y) + z_y, 0, 255), m_v = f32(s_v / s_y)                          -> uint8
    qattention_float  y with m_v = s_v                                                                 -> float32

q: uint8 [B, H, T, D]; k, v: uint8 [B, G, S, D], H a multiple of G; or all three without the dimension of heads; any
strides. mask: bool (True may look) or float32 (added), broadcastable to [B, H, T, S]. The result lies in memory as
[B, T, H, D], so that the transpose and reshape behind it copy nothing. heads = H, not 0: the heads lie side by side in
the rows, q [B, T, H * D], k [B, S, G * D], v [B, S, G * E], the result [B, T, H * E]: what linears give and take.
S <= 33025, so that the second sum cannot leave int32; a row of D <= 65793 cannot let the first. NumPy truth:
`fxq.numerics.qattention`, `qattention_float`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, is_tensor, replace
from fxq.pattern import Any as Anything
from fxq.pattern import Match, Miss, OneOf, Op
from fxq.qdq import dequantize, expect_dtype, quantize
from fxq.spelling import ATTENTION

MAX_KEYS = 33025
"""The most keys whose weighted sum cannot leave int32: 255 * 255 * S < 2**31."""


def _arrays(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int
) -> tuple[numerics.Array | None, ...]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_dtype(op, name, tensor, torch.uint8)
    if heads and (q.dim() != 3 or heads < 0 or q.shape[2] % heads or not q.shape[2]):
        raise ValueError(f"fxq::{op}: q{list(q.shape)} has not the rows of {heads} heads")
    if not 3 <= q.dim() <= 4 or k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(f"fxq::{op}: q{list(q.shape)}, k{list(k.shape)}, v{list(v.shape)} do not belong together")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        raise TypeError(f"fxq::{op}: mask has dtype {mask.dtype}, expected bool or float32")
    return q.numpy(), k.numpy(), v.numpy(), None if mask is None else mask.numpy()


def _laid_out(y: numerics.Array) -> Tensor:
    tensor = torch.from_numpy(y)
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if y.ndim == 4 else tensor.contiguous()


def _qattention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    arrays = _arrays("qattention", q, k, v, mask, rest[8] if len(rest) > 8 else 0)
    return _laid_out(numerics.qattention(*arrays, *rest))  # type: ignore[arg-type]


def _qattention_float(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    arrays = _arrays("qattention_float", q, k, v, mask, rest[7] if len(rest) > 7 else 0)
    return _laid_out(numerics.qattention_float(*arrays, *rest))  # type: ignore[arg-type]


def _empty(q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    if heads:  # as many of v's as of k's
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2] * q.shape[2] // k.shape[2], dtype=dtype)
    if q.dim() == 3:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=dtype).transpose(1, 2)


_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, int z_q, int z_v, float s_qk"

qattention = kernels.define(
    f"qattention({_OPERANDS}, float m_v, int zero_point, int masked, int heads=0) -> Tensor",
    _qattention,
    lambda q, k, v, *rest: _empty(q, k, v, rest[9] if len(rest) > 9 else 0, torch.uint8),
)
qattention_float = kernels.define(
    f"qattention_float({_OPERANDS}, float s_v, bool nan_if_masked, int heads=0) -> Tensor",
    _qattention_float,
    lambda q, k, v, *rest: _empty(q, k, v, rest[8] if len(rest) > 8 else 0, torch.float32),
)


_TO_FLOAT = Op(
    {ATTENTION},
    *(Op({dequantize}, Anything(x), Anything(f"s_{x}"), Anything(f"z_{x}"), shared=True) for x in "qkv"),
    *map(Anything, ("mask", "is_causal", "scale", "nan_if_masked")),
    name="attention",
)
_LOWERED = OneOf(Op({quantize}, _TO_FLOAT, Anything("s_y"), Anything("z_y")), _TO_FLOAT)


@dataclass(frozen=True)
class Attention(Family):
    """Attention as `passes.recognize_attention` spells it, over three float32 tensors."""

    name: str = "attention"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A refusal names the shape or dtype that the op does not take."""
        if node.op != "call_function":
            return None
        if node.target is F.scaled_dot_product_attention:
            why = "attention that was trained, with dropout, or with both a mask and is_causal"
            return Refusal(Reason.NO_INTEGER_OP, why)
        if node.target is not ATTENTION:
            return None
        q, k, v, mask = node.args[:4]
        for name, operand in (("q", q), ("k", k), ("v", v)):
            if not is_float_tensor(operand):
                return Refusal(Reason.NOT_FLOAT32, f"{name} is not float32")
        assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
        shapes = [operand.meta["value"].shape for operand in (q, k, v)]
        if any(len(shape) not in (3, 4) or len(shape) != len(shapes[0]) for shape in shapes):
            return Refusal(Reason.NO_INTEGER_OP, f"attention over shapes {', '.join(map(str, map(list, shapes)))}")
        if shapes[1][-2] > MAX_KEYS:
            return Refusal(Reason.ACC_OVERFLOW, f"{shapes[1][-2]} keys exceed {MAX_KEYS} (255 * 255 * S < 2**31)")
        if mask is not None and (mask in (q, k, v) or not _is_mask(mask)):
            return Refusal(Reason.NO_INTEGER_OP, "attention with a mask that is neither bool nor float32")
        return Claim("product", (q, k, v))

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(attention(dequantize, dequantize, dequantize)) -> qattention; without quantize, qattention_float."""
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        _lower(gm, match)
        return True


def _is_mask(mask: object) -> bool:
    return is_tensor(mask) and isinstance(mask, Node) and mask.meta["value"].dtype in (torch.bool, torch.float32)


def _lower(gm: GraphModule, match: Match) -> None:
    operands = tuple(match[name] for name in ("q", "k", "v", "mask", "is_causal", "scale", "z_q", "z_v"))
    s_qk, s_v = match["s_q"] * match["s_k"], match["s_v"]
    if match.root.target is not quantize:
        replace(gm, match.root, qattention_float, (*operands, s_qk, s_v, match["nan_if_masked"]))
        return
    s_y, z_y = match["s_y"], match["z_y"]
    masked = 0 if match["nan_if_masked"] else z_y  # what quantize makes of NaN, and of 0
    args = (*operands, s_qk, numerics.f32(s_v / s_y), z_y, masked)
    replace(gm, match.root, qattention, args, (s_y, z_y), match.node("attention"))


FAMILY = Attention()

"""linear: y = x w^T + b, the product that int8 is for.

    acc[m, n] = sum_k q_x[m, k] * q_w[n, k]                                                 exact int32
    bias_i32[n] = rne(b[n] / (s_x * s_w[n])) - z_x * sum_k q_w[n, k]                        folded ahead of time
    qlinear        q_y = clamp(rne(f32(acc + bias_i32) * f32(s_x * s_w[n] / s_y)) + z_y, low, high)         -> uint8
    qlinear_float  y   = f32(acc + bias_i32) * f32(s_x * s_w[n]) [+ addend]                               -> float32

q_x: uint8 [..., K]; weight: int8, packed (`fxq.numerics.pack`); bias: int32 [N]; multiplier: float32 [N];
addend: float32, broadcast with y over all dimensions but N. K <= 66311, so that acc cannot leave int32. A relu is
low = z_y, at no cost.
NumPy truth: `fxq.numerics.qlinear`, `qlinear_float`. The bias is derived (scale s_x * s_w[n]), never calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.decisions import Reason
from fxq.errors import CalibrationError
from fxq.family import Claim, Refusal
from fxq.graph import call, constant, get_attr, is_float_tensor, place_of, replace, set_constant
from fxq.pattern import Any, Const, Match, Op
from fxq.qdq import dequantize, dequantize_weight, expect_dtype, integer_bounds, quantize, round_clamp
from fxq.qtypes import MAX_K
from fxq.spelling import CLAMP, LINEAR, RELU, float_bounds


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The int8 weight [n, k] of a packed one; raises ValueError where the sizes do not belong together."""
    if packed.dim() != 1 or packed.numel() != numerics.packed_size(n, k):
        raise ValueError(
            f"fxq: a packed weight of shape {list(packed.shape)} is not one of [{n}, {k}], which takes "
            f"{numerics.packed_size(n, k)} bytes"
        )
    k4 = -(-k // 4)
    full = n // numerics.PANEL * numerics.PANEL
    blocks = []
    for width, part in (
        (numerics.PANEL, packed[: full * k4 * 4]),
        (-(-(n - full) // 16) * 16, packed[full * k4 * 4 :]),
    ):
        if width and part.numel():
            blocks.append(part.reshape(-1, k4, width, 4).permute(0, 2, 1, 3).reshape(-1, k4 * 4))
    return torch.cat(blocks)[:n, :k] if blocks else packed.new_zeros(n, k)


def _accumulate(op: str, x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
    """f32(acc + bias) * multiplier, in float64 up to the one rounding to float32."""
    expect_dtype(op, "x", x, torch.uint8)
    expect_dtype(op, "weight", weight, torch.int8)
    expect_dtype(op, "bias", bias, torch.int32)
    expect_dtype(op, "multiplier", multiplier, torch.float32)
    if multiplier.shape != bias.shape:
        raise ValueError(f"fxq::{op}: multiplier has shape {list(multiplier.shape)}, bias {list(bias.shape)}")
    w = unpack(weight, bias.shape[0], x.shape[-1])
    acc = torch.matmul(x.to(torch.float64), w.to(torch.float64).t()) + bias
    return acc.to(torch.float32) * multiplier


def _qlinear(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, zero_point: int, low: int, high: int
) -> Tensor:
    return round_clamp(_accumulate("qlinear", x, weight, bias, multiplier), zero_point, low, high)


def _qlinear_float(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, addend: Tensor | None = None) -> Tensor:
    y = _accumulate("qlinear_float", x, weight, bias, multiplier)
    if addend is None:
        return y
    expect_dtype("qlinear_float", "addend", addend, torch.float32)
    if addend.dim() and addend.shape[-1] not in (1, y.shape[-1]):
        raise ValueError(f"fxq::qlinear_float: addend has shape {list(addend.shape)}, the product {list(y.shape)}")
    return (y + addend).contiguous()


def _float_shape(x: Tensor, bias: Tensor, addend: Tensor | None) -> torch.Size:
    shape = torch.Size([*x.shape[:-1], bias.shape[0]])
    return shape if addend is None else torch.broadcast_shapes(shape, addend.shape)  # type: ignore[no-untyped-call]


qlinear = kernels.define(
    "qlinear(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int zero_point, int low, int high) -> Tensor",
    _qlinear,
    lambda x, weight, bias, multiplier, zero_point, low, high: x.new_empty(*x.shape[:-1], bias.shape[0]),
)
qlinear_float = kernels.define(
    "qlinear_float(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, Tensor? addend=None) -> Tensor",
    _qlinear_float,
    lambda x, weight, bias, multiplier, addend=None: x.new_empty(_float_shape(x, bias, addend), dtype=torch.float32),
)


def linear_clamp(x: Tensor, weight: Tensor, bias: Tensor | None, low: float | None, high: float | None) -> Tensor:
    """clamp(linear(x, weight, bias), low, high) in float: a linear that has swallowed the clamp behind it."""
    y = F.linear(x, weight, bias)
    return torch.relu(y) if (low, high) == (0.0, None) else torch.clamp(y, low, high)


_OPERANDS = (
    Op({dequantize}, Any("x"), Any("s_x"), Any("z_x"), shared=True),
    Op({dequantize_weight}, Const("w"), Const("s_w"), shared=True),
    Any("bias"),
)
_TO_FLOAT = Op({LINEAR}, *_OPERANDS)
_TO_UINT8 = Op({quantize}, Op({LINEAR}, *_OPERANDS, name="linear"), Any("s_y"), Any("z_y"))
_CLAMPED = Op(
    {quantize}, Op({linear_clamp}, *_OPERANDS, Any("low"), Any("high"), name="linear"), Any("s_y"), Any("z_y")
)
_CLAMPS = (
    Op({RELU}, Op({LINEAR}, Any("x"), Any("w"), Any("bias"), name="linear")),
    Op({CLAMP}, Op({LINEAR}, Any("x"), Any("w"), Any("bias"), name="linear"), Any("low"), Any("high")),
)


@dataclass(frozen=True)
class Linear:
    """A linear with a constant float32 weight."""

    name: str = "linear"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Raises `CalibrationError` for a weight that is not finite."""
        if node.op != "call_function" or node.target is not LINEAR:
            return None
        x, w, b = node.args
        for name, operand in (("weight", w), ("bias", b)):
            if isinstance(operand, Node) and (operand.op != "get_attr" or "aliases" in operand.meta):
                return Refusal(Reason.DYNAMIC_WEIGHT, f"{name} is {operand}")
        assert isinstance(w, Node)
        if x is w:
            return Refusal(Reason.NO_INTEGER_OP, f"{w} is multiplied by itself")
        weight = constant(gm, w)
        if not is_float_tensor(x) or weight.dtype != torch.float32:
            return Refusal(Reason.NOT_FLOAT32, f"weight is {weight.dtype}")
        for operand in (w, b):
            if isinstance(operand, Node) and not bool(torch.isfinite(constant(gm, operand)).all()):
                raise CalibrationError(
                    f"{place_of(node)}: the parameter {operand.target} holds NaN or infinity; repair the checkpoint"
                )
        assert isinstance(x, Node)
        if isinstance(b, Node) and constant(gm, b).shape != weight.shape[:1]:
            return Refusal(Reason.NO_INTEGER_OP, f"its bias has shape {list(constant(gm, b).shape)}")
        k = weight.shape[1]
        if not weight.numel():
            return Refusal(Reason.NO_INTEGER_OP, f"its weight has shape {list(weight.shape)}")
        if k > MAX_K:
            return Refusal(Reason.ACC_OVERFLOW, f"K = {k} exceeds {MAX_K} (255 * 127 * K < 2**31)")
        return Claim("product", (x,), w)

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """relu(linear(x, w, b)) -> linear_clamp(x, w, b, 0, None), and clamp likewise, where nobody else reads."""
        for pattern in _CLAMPS:
            match = pattern.match(clamp)
            bounds = float_bounds(clamp)
            if isinstance(match, Match) and bounds is not None:
                linear = match.node("linear")
                replace(gm, clamp, linear_clamp, (*linear.args, *bounds), like=linear)
                return True
        return False

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(linear[_clamp](dequantize, dequantize_weight, b)) -> qlinear; without quantize -> qlinear_float."""
        for pattern in (_TO_UINT8, _CLAMPED, _TO_FLOAT):
            match = pattern.match(node)
            if isinstance(match, Match):
                _lower(gm, match, notes)
                return True
        return False


def _lower(gm: GraphModule, match: Match, notes: list[str]) -> None:
    root = match.root
    quantized = root.target is quantize
    linear = match.node("linear") if quantized else root
    w = constant(gm, match.node("w")).numpy()
    s_w = np.broadcast_to(constant(gm, match.node("s_w")).numpy(), len(w))
    s_x, z_x, b = match["s_x"], match["z_x"], match["bias"]
    bias = constant(gm, b).detach().numpy() if isinstance(b, Node) else None
    folded = numerics.fold_bias(bias, w, s_x, z_x, s_w)
    fits = numerics.fits_int32(numerics.accumulator_bounds(folded, w))
    if not fits:
        # b / (s_x * s_w) leaves int32: the correction stays integer, the bias itself is added in float.
        folded = numerics.fold_bias(None, w, s_x, z_x, s_w)
        notes.append(
            f"{place_of(linear)}: its bias is too large for an int32 in steps of s_x * s_w, so it stays float32"
        )
    to_uint8 = quantized and fits
    multiplier = numerics.requantize_multiplier(s_x, s_w, match["s_y"] if to_uint8 else 1.0)

    stem = str(match.node("w").target).removesuffix("_int8")
    with gm.graph.inserting_before(root if to_uint8 else linear):
        constants = (
            _packed(gm, f"{stem}_packed", w),
            set_constant(gm, _sibling(stem, "bias_i32"), torch.from_numpy(folded.astype(np.int32))),
            set_constant(gm, _sibling(stem, "multiplier"), torch.from_numpy(multiplier)),
        )
        operands = (match.node("x"), *(get_attr(gm, path, linear) for path in constants))
    bounds = (match["low"], match["high"]) if linear.target is linear_clamp else (None, None)
    if to_uint8:
        low, high = integer_bounds(bounds, match["s_y"], match["z_y"])
        args = (*operands, match["z_y"], low, high)
        lowered = replace(gm, root, qlinear, args, (match["s_y"], match["z_y"]), linear)
        lowered.meta["weight_scales"] = s_w  # for `use_fixed_point`, which needs more of them than float32 products
        return
    y = replace(gm, linear, qlinear_float, operands if fits else (*operands, b))
    if bounds != (None, None):
        with gm.graph.inserting_after(y):
            clamp = call(gm, CLAMP, (y, *bounds), y)
        y.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)


def _sibling(stem: str, name: str) -> str:
    """The path of a derived constant beside a weight: `fc1.weight` -> `fc1.bias_i32`, `w` -> `w_bias_i32`."""
    owner, _, leaf = stem.rpartition(".")
    name = name if leaf == "weight" else f"{leaf}_{name}"
    return f"{owner}.{name}" if owner else name


def _packed(gm: GraphModule, path: str, w: numerics.I8) -> str:
    """The path of the packed weight, made once for all calls that share the weight."""
    owner, _, name = path.rpartition(".")
    packed = torch.from_numpy(numerics.pack(w))
    known = getattr(gm.get_submodule(owner), name, None)
    if isinstance(known, Tensor) and known.dtype == torch.int8 and torch.equal(known, packed):
        return path
    return set_constant(gm, path, packed)


FAMILY = Linear()

"""What the products of a network have in common: which constants they take, what lowering derives from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.clamps import clamp_behind
from fxq.decisions import Reason
from fxq.errors import CalibrationError
from fxq.family import Claim, Refusal
from fxq.graph import constant, get_attr, is_finite, is_tensor, place_of, replace, set_constant
from fxq.packing import shared_constant, sibling
from fxq.pattern import Match
from fxq.qdq import integer_bounds
from fxq.qtypes import MAX_K, Scheme

_STATIC: Mapping[torch.dtype, tuple[Scheme, ...]] = {torch.float32: ("w8a8",)}


def claim(gm: GraphModule, node: Node, schemes: Mapping[torch.dtype, tuple[Scheme, ...]] = _STATIC) -> Claim | Refusal:
    """Of a product node(x, weight, bias, ...), weight [N, ...] and bias [N] or None: whether its operands allow int8.

    schemes: those that the family has for each dtype of weight and x. Raises `CalibrationError` for constants that are
    not finite.
    """
    x, w, b = node.args[:3]
    for name, operand in (("weight", w), ("bias", b)):
        if isinstance(operand, Node) and (operand.op != "get_attr" or "aliases" in operand.meta):
            return Refusal(Reason.DYNAMIC_WEIGHT, f"{name} is {operand}")
    assert isinstance(w, Node)
    if x is w:
        return Refusal(Reason.NO_INTEGER_OP, f"{w} is multiplied by itself")
    weight = constant(gm, w)
    known = schemes.get(weight.dtype, ())
    if weight.is_complex():  # whose imaginary part .float() would drop
        return Refusal(Reason.NO_INTEGER_OP, f"its weight is {weight.dtype}")
    if not isinstance(x, Node) or not is_tensor(x) or x.meta["value"].dtype != weight.dtype or not known:
        return Refusal(Reason.NOT_FLOAT32, f"weight is {weight.dtype}")
    if weight.layout != torch.strided:
        return Refusal(Reason.NO_INTEGER_OP, f"its weight is {weight.layout}")
    for operand in (w, b):
        if isinstance(operand, Node) and not is_finite(constant(gm, operand)):
            raise CalibrationError(
                f"{place_of(node)}: the parameter {operand.target} holds NaN or infinity; repair the checkpoint"
            )
    if isinstance(b, Node) and constant(gm, b).shape != weight.shape[:1]:
        return Refusal(Reason.NO_INTEGER_OP, f"its bias has shape {list(constant(gm, b).shape)}")
    if not weight.numel():
        return Refusal(Reason.NO_INTEGER_OP, f"its weight has shape {list(weight.shape)}")
    k = weight[0].numel()
    if k > MAX_K:
        return Refusal(Reason.ACC_OVERFLOW, f"K = {k} exceeds {MAX_K} (255 * 127 * K < 2**31)")
    return Claim("product", (x,), w, known)


@dataclass(frozen=True)
class Constants:
    """What a lowered product reads: nodes of the packed weight, the int32 bias and the multiplier.

    to_uint8: whether the epilogue may requantize. addend: the bias, where it does not fit int32 and is added in float.
    weight_scales: float32 [N].
    """

    operands: tuple[Node, Node, Node]
    to_uint8: bool
    addend: Node | None
    weight_scales: numerics.F32


Fold = Callable[["numerics.F32 | None", numerics.I8, float, int, numerics.F32], npt.NDArray[np.int64]]
Pack = Callable[[numerics.I8], numerics.I8]


def derive(
    gm: GraphModule, match: Match, product: Node, root: Node, fold: Fold, pack: Pack, notes: list[str]
) -> Constants:
    """The constants of a matched product with x, s_x, z_x, w, s_w, bias, and s_y where `root` is its quantize."""
    w = constant(gm, match.node("w")).numpy()
    s_w = np.broadcast_to(constant(gm, match.node("s_w")).numpy(), len(w))
    s_x, z_x, b = match["s_x"], match["z_x"], match["bias"]
    bias = constant(gm, b).detach().numpy() if isinstance(b, Node) else None
    flat = w.reshape(len(w), -1)
    folded = fold(bias, w, s_x, z_x, s_w)
    fits = all(numerics.fits_int32(numerics.accumulator_bounds(row, flat)) for row in folded.reshape(-1, len(w)))
    if not fits:
        # b / (s_x * s_w) leaves int32: the correction stays integer, the bias itself is added in float.
        folded = fold(None, w, s_x, z_x, s_w)
        notes.append(
            f"{place_of(product)}: its bias is too large for an int32 in steps of s_x * s_w, so it stays float32"
        )
    to_uint8 = root is not product and fits
    multiplier = numerics.requantize_multiplier(s_x, s_w, match["s_y"] if to_uint8 else 1.0)
    path = str(match.node("w").target)
    with gm.graph.inserting_before(root if to_uint8 else product):
        paths = (
            shared_constant(gm, sibling(path, "weight_packed"), torch.from_numpy(pack(w))),
            set_constant(gm, sibling(path, "bias_i32"), torch.from_numpy(folded.astype(np.int32))),
            set_constant(gm, sibling(path, "multiplier"), torch.from_numpy(multiplier)),
        )
        packed, bias_i32, scale = (get_attr(gm, path, product) for path in paths)
    return Constants((packed, bias_i32, scale), to_uint8, b if not fits and isinstance(b, Node) else None, s_w)


Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""An op, and its operands."""


def write(gm: GraphModule, match: Match, product: Node, constants: Constants, integer: Call, floating: Call) -> Node:
    """Put the integer op in the place of a matched product, which may have swallowed a clamp (low, high).

    integer: the op that gives uint8, and its operands before z_y, low and high; floating: the one that gives float32.
    """
    bounds = match.bound.get("low"), match.bound.get("high")
    if not constants.to_uint8:
        y = replace(gm, product, *floating)
        clamp_behind(gm, y, bounds)
        return y
    (target, operands), qparams = integer, (match["s_y"], match["z_y"])
    args = (*operands, qparams[1], *integer_bounds(bounds, *qparams))
    y = replace(gm, match.root, target, args, qparams, product)
    # For `use_fixed_point`, which needs more of them than float32 products.
    y.meta["weight_scales"] = constants.weight_scales
    return y

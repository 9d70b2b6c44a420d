"""What the products of a network have in common: which constants they take, what lowering derives from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.decisions import Reason
from fxq.errors import CalibrationError
from fxq.family import Claim, Refusal
from fxq.graph import call, constant, get_attr, is_float_tensor, place_of, set_constant
from fxq.pattern import Match
from fxq.qtypes import MAX_K
from fxq.spelling import CLAMP


def claim(gm: GraphModule, node: Node) -> Claim | Refusal:
    """Of a product node(x, weight, bias, ...), weight [N, ...] and bias [N] or None: whether its operands allow int8.

    Raises `CalibrationError` for constants that are not finite.
    """
    x, w, b = node.args[:3]
    for name, operand in (("weight", w), ("bias", b)):
        if isinstance(operand, Node) and (operand.op != "get_attr" or "aliases" in operand.meta):
            return Refusal(Reason.DYNAMIC_WEIGHT, f"{name} is {operand}")
    assert isinstance(w, Node)
    if x is w:
        return Refusal(Reason.NO_INTEGER_OP, f"{w} is multiplied by itself")
    weight = constant(gm, w)
    if not is_float_tensor(x) or weight.dtype != torch.float32:
        return Refusal(Reason.NOT_FLOAT32, f"weight is {weight.dtype}")
    if weight.layout != torch.strided:
        return Refusal(Reason.NO_INTEGER_OP, f"its weight is {weight.layout}")
    for operand in (w, b):
        if isinstance(operand, Node) and not bool(torch.isfinite(constant(gm, operand)).all()):
            raise CalibrationError(
                f"{place_of(node)}: the parameter {operand.target} holds NaN or infinity; repair the checkpoint"
            )
    assert isinstance(x, Node)
    if isinstance(b, Node) and constant(gm, b).shape != weight.shape[:1]:
        return Refusal(Reason.NO_INTEGER_OP, f"its bias has shape {list(constant(gm, b).shape)}")
    if not weight.numel():
        return Refusal(Reason.NO_INTEGER_OP, f"its weight has shape {list(weight.shape)}")
    k = weight[0].numel()
    if k > MAX_K:
        return Refusal(Reason.ACC_OVERFLOW, f"K = {k} exceeds {MAX_K} (255 * 127 * K < 2**31)")
    return Claim("product", (x,), w)


@dataclass(frozen=True)
class Constants:
    """What a lowered product reads: nodes of the packed weight, the int32 bias and the multiplier.

    to_uint8: whether the epilogue may requantize. addend: the bias, where it does not fit int32 and is added in float.
    """

    operands: tuple[Node, Node, Node]
    to_uint8: bool
    addend: Node | None


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
    stem = str(match.node("w").target).removesuffix("_int8")
    with gm.graph.inserting_before(root if to_uint8 else product):
        paths = (
            _once(gm, f"{stem}_packed", torch.from_numpy(pack(w))),
            set_constant(gm, _sibling(stem, "bias_i32"), torch.from_numpy(folded.astype(np.int32))),
            set_constant(gm, _sibling(stem, "multiplier"), torch.from_numpy(multiplier)),
        )
        packed, bias_i32, scale = (get_attr(gm, path, product) for path in paths)
    return Constants((packed, bias_i32, scale), to_uint8, b if not fits and isinstance(b, Node) else None)


def clamp_behind(gm: GraphModule, y: Node, bounds: tuple[float | None, float | None]) -> None:
    """Put the clamp that a product had swallowed behind its float result again."""
    if bounds == (None, None):
        return
    with gm.graph.inserting_after(y):
        clamp = call(gm, CLAMP, (y, *bounds), y)
    y.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)


def _sibling(stem: str, name: str) -> str:
    """The path of a derived constant beside a weight: `fc1.weight` -> `fc1.bias_i32`, `w` -> `w_bias_i32`."""
    owner, _, leaf = stem.rpartition(".")
    name = name if leaf == "weight" else f"{leaf}_{name}"
    return f"{owner}.{name}" if owner else name


def _once(gm: GraphModule, path: str, packed: Tensor) -> str:
    """The path of the packed weight, made once for all calls that share the weight."""
    owner, _, name = path.rpartition(".")
    known = getattr(gm.get_submodule(owner), name, None)
    if isinstance(known, Tensor) and known.dtype == torch.int8 and torch.equal(known, packed):
        return path
    return set_constant(gm, path, packed)

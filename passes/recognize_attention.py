"""recognize_attention: attention however it is spelled becomes `fxq.spelling.attention`.

    F.scaled_dot_product_attention(q, k, v, mask, scale=c)                  -> attention(q, k, v, mask, False, c, False)
    softmax(q @ k.transpose(-2, -1) * c + mask, -1) @ v                     -> attention(q, k, v, mask, False, c, True)
    (q * c).bmm(k.mT), baddbmm(mask, q, k.mT), einsum('bthd,bshd->bhts')    -> the same, operands moved to [B, H, T, D]
    scores.masked_fill(hidden, -inf), torch.where(seen, scores, -inf)       -> a bool mask; -1e9 and less: a float mask
    softmax(q @ k.mT in [B * H, T, S] as [B, H, T, S] + mask)               -> the mask as [B * H, T, S]
    k[:, :, None].expand(...).reshape(...), repeat_interleave(k, n, 1)      -> k, whose heads are shared

`fxq.attention_by_hand` finds what is spelled out. Dropout on the weights, which only a graph that is to be trained has,
goes into the `meta`. Several masks become their sum. What fits none of this keeps the operations that it has.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxq import graph
from fxq.attention_by_hand import Factor, Operand, Scores, find, named, scaled, shape_of, swapped
from fxq.graph import Value, bypass, call, is_float_tensor
from fxq.ops.dropout import DROPOUT
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD, ATTENTION, GETITEM, MOVES
from fxq.stages import Stage


@dataclass(frozen=True)
class RecognizeAttention:
    """See the module's docstring."""

    name: str = "recognize-attention"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of attentions written in their one spelling."""
        count = 0
        for node in list(gm.graph.nodes):
            if not node._erased and is_float_tensor(node):
                count += _rewrite_torchs(gm, node) or _rewrite_by_hand(gm, node)
        return count


def _rewrite_torchs(gm: GraphModule, node: Node) -> bool:
    if node.target is not F.scaled_dot_product_attention:
        return False
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, **named(node, *names)}
    q, k, v, mask, is_causal, scale = (given[n] for n in (*names[:4], "is_causal", "scale"))
    if isinstance(mask, Node) and mask.meta.get("value") is None:
        mask = None  # an argument that a guard holds to None
    if given["dropout_p"] != 0 or not isinstance(is_causal, bool) or (mask is not None and is_causal):
        return False
    _write(gm, node, Attention(q, k, v, mask, is_causal, scale, nan_if_masked=False))
    return True


@dataclass(frozen=True)
class Attention:
    """The operands of `fxq.spelling.attention`."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: Any
    nan_if_masked: bool


def _write(gm: GraphModule, node: Node, found: Attention) -> Node:
    """Put the one spelling in the place of `node`; factors of q and k join the scale, repeated heads are shared."""
    k, v = _before_repeat(found.k), _before_repeat(found.v)
    if k is not None and v is not None and shape_of(k)[1] == shape_of(v)[1]:
        found = replace(found, k=k, v=v)
    args = (found.q, found.k, found.v, found.mask, found.is_causal, found.scale, found.nan_if_masked)
    new = graph.replace(gm, node, ATTENTION, args)
    if found.scale is not None:
        for i in (0, 1):
            _take_factors(gm, new, i)
    return new


def _take_factors(gm: GraphModule, new: Node, i: int) -> None:
    """Numbers that multiply operand `i` of `new` on its way from where it was computed become part of the scale."""
    reader, operand = new, new.args[i]
    while isinstance(operand, Node) and len(operand.users) == 1 and reader.all_input_nodes.count(operand) == 1:
        if new.args.count(operand) > 1 or "aliases" in operand.meta:
            break
        found = scaled(gm, operand)
        if found is not None:
            new.update_arg(5, _times(gm, new, new.args[5], [found[1]]))  # first: what nobody reads goes
            bypass(gm, operand, found[0])
            operand = found[0]
        elif operand.target in MOVES:
            reader, operand = operand, operand.args[0]
        else:
            break


def _times(gm: GraphModule, before: Node, scale: Any, factors: Sequence[Factor]) -> Any:
    """scale * factors, as a number where all are numbers."""
    for factor, over in factors:
        function = operator.truediv if over else operator.mul
        if isinstance(scale, Node) or isinstance(factor, Node):
            with gm.graph.inserting_before(before):
                scale = call(gm, function, (scale, factor), before)
            scale.meta["value"] = 1.0
        else:
            scale = function(scale, factor)
    return scale


def _before_repeat(k: Node) -> Node | None:
    """[B, G, S, D] of what repeats each of its heads n times in a row, as [B, G * n, S, D]."""
    if len(shape_of(k)) != 4:
        return None
    if k.target in (torch.repeat_interleave, "repeat_interleave"):
        given = named(k, "input", "repeats", "dim")
        whole = isinstance(given["repeats"], int) and given.get("dim") in (1, -3) and "output_size" not in given
        return given["input"] if whole and is_float_tensor(given["input"]) else None
    expanded = k.args[0] if k.target is torch.reshape else None
    widened = expanded.args[0] if isinstance(expanded, Node) and expanded.target == "expand" else None
    if not isinstance(expanded, Node) or not isinstance(widened, Node) or not is_float_tensor(widened):
        return None
    every = slice(None, None, None)
    indices = [(every, every, None, *(every,) * n) for n in range(3)]
    sliced = widened.target is GETITEM and widened.args[1] in indices
    if not (sliced or _is_call(widened, torch.unsqueeze, 2)):
        return None
    source = widened.args[0]
    if not isinstance(source, Node) or len(shape_of(source)) != 4 or len(shape_of(expanded)) != 5:
        return None
    b, g, n, s, d = shape_of(expanded)
    return source if shape_of(source) == (b, g, s, d) and shape_of(k) == (b, g * n, s, d) else None


def _is_call(node: Node, target: object, *operands: object) -> bool:
    return node.target is target and node.args[1:] == operands


def _rewrite_by_hand(gm: GraphModule, node: Node) -> bool:
    found = find(gm, node)
    if found is None:
        return False
    scores, order = found.scores, found.order
    q, k, v = (_moved(gm, node, operand) for operand in (found.product.q, found.product.k, found.v))
    masked = replace(scores, added=(*_merged_masks(gm, node, scores), *scores.added[scores.outside :]))
    mask, scale = _mask(gm, node, masked), _times(gm, node, 1.0, scores.factors)
    new = _write(gm, node, Attention(q, k, v, mask, False, scale, nan_if_masked=True))
    if found.dropout is not None:
        new.meta[DROPOUT] = found.dropout
    if order is not None:
        shape = shape_of(new)
        with gm.graph.inserting_after(new):
            moved = call(gm, torch.permute, (new, order), new)
        new.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        new.meta["value"] = Value(torch.float32, tuple(shape[i] for i in inverse))
        new.meta.pop("source", None)
    return True


def _moved(gm: GraphModule, before: Node, operand: Operand) -> Node:
    """The tensor in the order that is wanted, by a move that is inserted where there is none to take back."""
    node, order = operand.node, operand.order
    rank = len(order)
    if order == tuple(range(rank)):
        return node
    dims = {d % rank for d in node.args[1:]} if node.target is torch.transpose else set()  # type: ignore[operator]
    if order == swapped(rank) and dims == {rank - 2, rank - 1}:
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    with gm.graph.inserting_before(before):
        move = call(gm, torch.permute, (node, order), node)
    move.meta.pop("source", None)
    move.meta["value"] = Value(torch.float32, operand.shape)
    return move


def _merged_masks(gm: GraphModule, before: Node, found: Scores) -> list[Node]:
    """The masks that are added to [B, H, T, S], for scores that are [B * H, T, S]."""
    masks = list(found.added[: found.outside])
    for i, mask in enumerate(masks):
        if len(shape_of(mask)) > 2:  # others broadcast to either
            assert found.split is not None
            sizes, (t, s) = found.split.args[1], shape_of(mask)[-2:]
            assert isinstance(sizes, tuple | list)
            with gm.graph.inserting_before(before):
                whole = call(gm, torch.broadcast_to, (mask, (*sizes[:2], -1, -1)), before)
                masks[i] = call(gm, torch.flatten, (whole, 0, 1), before)
            for new, shape in ((whole, shape_of(found.split)[:2]), (masks[i], (math.prod(shape_of(found.split)[:2]),))):
                new.meta.pop("source", None)
                new.meta["value"] = Value(torch.float32, (*shape, t, s))
    return masks


def _mask(gm: GraphModule, before: Node, found: Scores) -> Node | None:
    """One mask of all: bool where there is one that hides with -inf, else the float sum of them."""

    def insert(target: Any, args: tuple[Any, ...]) -> Node:
        with gm.graph.inserting_before(before):
            new = call(gm, target, args, before)
        new.meta.pop("source", None)
        return new

    if len(found.filled) == 1 and not found.added and found.filled[0][1] == -torch.inf:
        mask, _, hides = found.filled[0]
        return insert(torch.logical_not, (mask,)) if hides else mask
    floats = [*found.added]
    for mask, fill, hides in found.filled:
        floats.append(insert(torch.where, (mask, fill, 0.0) if hides else (mask, 0.0, fill)))
    total = floats[0] if floats else None
    for mask in floats[1:]:
        total = insert(ADD, (total, mask))
    return total


PASS = RecognizeAttention()

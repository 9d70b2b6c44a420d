"""simplify_masks: what an attention's mask says, without the tensors that only spell it out.

    mask.expand(B, -1, T, S)                    -> mask, as an attention broadcasts it by itself
    (arange(T)[:, None] >= 0) & mask            -> mask: all of it is True
    new_ones(()) & mask                         -> mask
    mask[arange(B)[:, None, None, None], arange(S)]
                                                -> narrow(mask, 0, 0, B)[:, None, None], a view; 0..S-1 all there is

Hugging Face's masks, for instance, are made from a dozen small tensors at each call, which of a short sentence is as
much time as a layer. Only where attentions alone read the mask, or what it is made of.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, bypass, call, is_size
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD, ATTENTION, GETITEM
from fxq.stages import Stage

MASK = 3
"""Its place among the operands of an attention."""


@dataclass(frozen=True)
class SimplifyMasks:
    """See the module's docstring."""

    name: str = "simplify-masks"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING  # torch has other kernels for other strides of a mask

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of steps that went."""
        masks = {node.args[MASK]: None for node in gm.graph.nodes if node.target is ATTENTION}
        return sum(_simplify(gm, mask) for mask in masks if isinstance(mask, Node))


def _simplify(gm: GraphModule, mask: Node) -> int:
    """Step by step from the mask backwards, as long as attentions alone read it."""
    count = 0
    while all(user.target is ATTENTION and user.args.index(mask) == MASK for user in mask.users):
        simpler = _expanded(mask) or _other_than_true(mask) or _view(gm, mask)
        if simpler is None:
            break
        bypass(gm, mask, simpler)
        mask, count = simpler, count + 1
    return count


def _is_mask(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("value"), Value) and "aliases" not in node.meta


def _expanded(node: Node) -> Node | None:
    """What `node` repeats along dimensions of size one."""
    source = node.args[0] if node.op == "call_method" and node.target == "expand" else None
    return source if isinstance(source, Node) and _is_mask(source) and not node.kwargs else None


def _other_than_true(node: Node) -> Node | None:
    """The operand of an `and` whose other operand is True everywhere, and has no more dimensions."""
    if node.target is not operator.and_:
        return None
    for true, other in (node.args, node.args[::-1]):
        if isinstance(other, Node) and _is_mask(other) and isinstance(true, Node) and _is_true(true):
            a, b = true.meta["value"], other.meta["value"]
            if b.dtype == a.dtype == torch.bool and len(a.shape) <= len(b.shape):
                return other
    return None


def _is_true(node: Node) -> bool:
    """Whether a tensor of booleans holds nothing but True, whatever its size."""
    if not _is_mask(node) or node.meta["value"].dtype != torch.bool:
        return False
    if node.target == "new_ones" or node.target is torch.ones:
        return True
    if node.target is operator.and_:
        return all(isinstance(operand, Node) and _is_true(operand) for operand in node.args)
    a, b = (*node.args, None, None)[:2]
    return node.target is operator.ge and type(b) is int and b <= 0 and _counted(a) is not None


def _counted(node: object) -> tuple[Node, int] | None:
    """The arange from 0 that `node` is a view of, and the dimension along which it runs."""
    views: list[tuple[object, ...]] = []
    while isinstance(node, Node) and _is_mask(node):
        if node.target is torch.arange:
            plain = len(node.args) == 1 and set(node.kwargs) <= {"device", "dtype"}
            if not plain or len(views) > 1:
                return None
            return node, views[0].index(slice(None)) if views else 0
        if node.target is ADD and node.args[1:] == (0,) and not node.kwargs:
            node = node.args[0]
            continue
        index = node.args[1] if node.target is GETITEM else None
        if not isinstance(index, tuple) or [part for part in index if part is not None] != [slice(None)]:
            return None
        views.append(index)
        node = node.args[0]
    return None


def _view(gm: GraphModule, node: Node) -> Node | None:
    """mask [B, S] taken at all of 0..B'-1 in a first and 0..S-1 in a last dimension."""
    source, index = (*node.args, None, None)[:2]
    if node.target is not GETITEM or not isinstance(index, tuple) or len(index) != 2 or not isinstance(source, Node):
        return None
    counted = [_counted(part) for part in index]
    first, last = counted
    if first is None or last is None or not _is_mask(source) or len(source.meta["value"].shape) != 2:
        return None
    rank = len(node.meta["value"].shape)
    ranks = {len(part.meta["value"].shape) for part in index if isinstance(part, Node)}
    if ranks != {rank} or first[1] != 0 or last[1] != rank - 1 or not _is_size_of(last[0].args[0], source, 1):
        return None
    with gm.graph.inserting_before(node):
        rows = source
        if not _is_size_of(first[0].args[0], source, 0):
            rows = call(gm, torch.narrow, (source, 0, 0, first[0].args[0]), node)
            rows.meta["value"] = Value(torch.bool, (node.meta["value"].shape[0], source.meta["value"].shape[1]))
        return call(gm, GETITEM, (rows, (slice(None), *[None] * (rank - 2), slice(None))), node)


def _is_size_of(number: object, tensor: Node, dim: int) -> bool:
    return isinstance(number, Node) and is_size(number) and number.args == (tensor, dim)


PASS = SimplifyMasks()

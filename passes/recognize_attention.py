"""recognize_attention: attention however it is spelled becomes `fxq.spelling.attention`.

    F.scaled_dot_product_attention(q, k, v, mask, scale=c)                  -> attention(q, k, v, mask, False, c, False)
    softmax(q @ k.transpose(-2, -1) * c + mask, -1) @ v                     -> attention(q, k, v, mask, False, c, True)
    (q * c).bmm(k.mT), baddbmm(mask, q, k.mT), einsum('bthd,bshd->bhts')    -> the same, operands moved to [B, H, T, D]
    scores.masked_fill(hidden, -inf), torch.where(seen, scores, -inf)       -> a bool mask; -1e9 and less: a float mask
    softmax(q @ k.mT in [B * H, T, S] as [B, H, T, S] + mask)               -> the mask as [B * H, T, S]
    k[:, :, None].expand(...).reshape(...), repeat_interleave(k, n, 1)      -> k, whose heads are shared

By hand means a softmax over the last dimension of scores that nobody else reads, nor the weights. Dropout on the
weights, which only a graph that is to be trained has, goes into the `meta`. Several masks become their sum. What fits
none of this keeps the operations that it has.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxq import graph
from fxq.graph import STATE, Value, bypass, call, constant, is_float_tensor, is_tensor, submodule
from fxq.ops.dropout import DROPOUT, Dropout
from fxq.pipeline import Context, Numbers
from fxq.spelling import ADD, ATTENTION, GETITEM, MOVES
from fxq.stages import Stage

PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
BIASED_PRODUCTS = frozenset({torch.baddbmm, "baddbmm"})
SOFTMAXES = frozenset({F.softmax, torch.softmax, "softmax"})
TIMES = frozenset({operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", "__rmul__"})
OVER = frozenset({operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "__truediv__"})
TIMES_IN_PLACE = frozenset({operator.imul, "mul_", "multiply_"})
OVER_IN_PLACE = frozenset({operator.itruediv, "div_", "divide_"})
PLUS = frozenset({ADD, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__"})
FILLS = frozenset({torch.masked_fill, "masked_fill", "masked_fill_"})
CHOICES = frozenset({torch.where, "where"})
CASTS = frozenset({"to", "type_as", "float"})
LEAST_FILL = -1e9
"""Added to scores it leaves nothing of their differences; what fills with more does not become a mask."""

Factor = tuple[Any, bool]
"""A number, or a node of one, and whether it divides."""


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
    named = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, **_named(node, *names)}
    q, k, v, mask, is_causal, scale = (named[n] for n in (*names[:4], "is_causal", "scale"))
    if isinstance(mask, Node) and mask.meta.get("value") is None:
        mask = None  # an argument that a guard holds to None
    if named["dropout_p"] != 0 or not isinstance(is_causal, bool) or (mask is not None and is_causal):
        return False
    _write(gm, node, Attention(q, k, v, mask, is_causal, scale, nan_if_masked=False))
    return True


def _named(node: Node, *names: str) -> dict[str, Any]:
    """The operands by name, `names` those of the positional ones."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


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
    if k is not None and v is not None and _shape(k)[1] == _shape(v)[1]:
        found = replace(found, k=k, v=v)
    args = (found.q, found.k, found.v, found.mask, found.is_causal, found.scale, found.nan_if_masked)
    new = graph.replace(gm, node, ATTENTION, args)
    if found.scale is not None:
        factors = [factor for i in (0, 1) for factor in _take_factors(gm, new, i)]
        new.update_arg(5, _times(gm, new, found.scale, factors))
    return new


def _take_factors(gm: GraphModule, new: Node, i: int) -> list[Factor]:
    """Numbers that multiply operand `i` of `new` on its way from where it was computed, which they leave."""
    factors: list[Factor] = []
    reader, operand = new, new.args[i]
    while isinstance(operand, Node) and len(operand.users) == 1 and reader.all_input_nodes.count(operand) == 1:
        if new.args.count(operand) > 1 or "aliases" in operand.meta:
            break
        scaled = _scaled(gm, operand)
        if scaled is not None:
            bypass(gm, operand, scaled[0])
            factors.append(scaled[1])
            operand = scaled[0]
        elif operand.target in MOVES:
            reader, operand = operand, operand.args[0]
        else:
            break
    return factors


def _scaled(gm: GraphModule, node: Node, *, in_place: bool = False) -> tuple[Node, Factor] | None:
    """x and c of a node that is x * c or x / c, c a number."""
    over = node.target in OVER or (in_place and node.target in OVER_IN_PLACE)
    times = node.target in TIMES or (in_place and node.target in TIMES_IN_PLACE)
    if not (over or times) or len(node.args) != 2 or node.kwargs:
        return None
    x, c = node.args
    number = _number(gm, c)
    if number is None and times:
        x, number = c, _number(gm, x)
    if over and number == 0:
        return None
    return (x, (number, over)) if number is not None and isinstance(x, Node) and is_float_tensor(x) else None


def _number(gm: GraphModule, value: object) -> Any:
    """A number, a node of one, or the number in a constant without dimensions; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, Node):
        return None
    known = value.meta.get("value")
    if isinstance(known, int | float) and not isinstance(known, bool):
        return value
    if value.op == "get_attr" and value.target not in gm.meta.get(STATE, ()) and constant(gm, value).dim() == 0:
        return constant(gm, value).item()
    return None


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


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta["value"]
    assert isinstance(value, Value)
    return value.shape


def _before_repeat(k: Node) -> Node | None:
    """[B, G, S, D] of what repeats each of its heads n times in a row, as [B, G * n, S, D]."""
    if len(_shape(k)) != 4:
        return None
    if k.target in (torch.repeat_interleave, "repeat_interleave"):
        named = _named(k, "input", "repeats", "dim")
        whole = isinstance(named["repeats"], int) and named.get("dim") in (1, -3) and "output_size" not in named
        return named["input"] if whole and is_float_tensor(named["input"]) else None
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
    if not isinstance(source, Node) or len(_shape(source)) != 4 or len(_shape(expanded)) != 5:
        return None
    b, g, n, s, d = _shape(expanded)
    return source if _shape(source) == (b, g, s, d) and _shape(k) == (b, g * n, s, d) else None


def _is_call(node: Node, target: object, *operands: object) -> bool:
    return node.target is target and node.args[1:] == operands


# Attention by hand, from the last product back to the first.


@dataclass(frozen=True)
class Scores:
    """Where the scores come from: the product's operands as [..., T, D] and [..., S, D] after `order`, and its place.

    added: float masks. hidden, seen: bool masks, with the number that fills what is not to be seen. split: the reshape
    of [B * H, T, S] to [B, H, T, S], where there is one; the first `outside` of `added` are added behind it. Operations
    are collected from the softmax inwards.
    """

    factors: tuple[Factor, ...] = ()
    added: tuple[Node, ...] = ()
    hidden: tuple[tuple[Node, float], ...] = ()
    seen: tuple[tuple[Node, float], ...] = ()
    q: Operand | None = None
    k: Operand | None = None
    product: Node | None = None
    split: Node | None = None
    outside: int = 0

    def with_mask(self, **masks: Any) -> Scores | None:
        """With one more mask; None where what was found outside it would scale it."""
        return None if self.factors else replace(self, **masks)


@dataclass(frozen=True)
class Operand:
    """A tensor, and the order of its dimensions in which it is wanted."""

    node: Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in that order."""
        return tuple(_shape(self.node)[i] for i in self.order)

    def moved(self, gm: GraphModule, before: Node) -> Node:
        """The tensor in that order, by a move that is inserted where there is none to take back."""
        rank = len(self.order)
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        if self.order == tuple(range(rank)):
            return self.node
        dims = {d % rank for d in self.node.args[1:]} if self.node.target is torch.transpose else set()  # type: ignore[operator]
        if self.order == swapped and dims == {rank - 2, rank - 1}:
            source = self.node.args[0]
            assert isinstance(source, Node)
            return source
        with gm.graph.inserting_before(before):
            move = call(gm, torch.permute, (self.node, self.order), self.node)
        move.meta.pop("source", None)
        move.meta["value"] = Value(torch.float32, self.shape)
        return move


def _rewrite_by_hand(gm: GraphModule, node: Node) -> bool:
    product = _last_product(node)
    if product is None:
        return False
    weights, v, order = product
    merged = _regrouped(weights, 4)
    weights = weights if merged is None else merged
    dropout = _dropout(gm, weights)
    if dropout is not None:
        weights, _ = dropout
    scores = _softmax_of(gm, weights)
    found = None if scores is None else _scores(gm, scores, Scores())
    if scores is None or found is None or found.q is None or found.k is None or found.product is None:
        return False
    if (found.split is None) != (merged is None):
        return False
    shapes = found.q.shape, found.k.shape, v.shape
    if any(len(shape) not in (3, 4) or shape[:-2] != shapes[0][:-2] for shape in shapes):
        return False
    masks = [*found.added, *(mask for mask, _ in (*found.hidden, *found.seen))]
    places = [scores] * found.outside + [found.product] * (len(masks) - found.outside)
    if not all(_fits(_shape(mask), _shape(place)) for mask, place in zip(masks, places, strict=True)):
        return False
    if not all(_settled(gm, x, found.product) for x in (found.q.node, found.k.node, *masks)):
        return False
    q, k, values = (operand.moved(gm, node) for operand in (found.q, found.k, v))
    masked = replace(found, added=(*_merged_masks(gm, node, found), *found.added[found.outside :]))
    mask, scale = _mask(gm, node, masked), _times(gm, node, 1.0, found.factors)
    new = _write(gm, node, Attention(q, k, values, mask, False, scale, nan_if_masked=True))
    if dropout is not None:
        new.meta[DROPOUT] = dropout[1]
    if order is not None:
        shape = _shape(new)
        with gm.graph.inserting_after(new):
            moved = call(gm, torch.permute, (new, order), new)
        new.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        new.meta["value"] = Value(torch.float32, tuple(shape[i] for i in inverse))
        new.meta.pop("source", None)
    return True


def _regrouped(node: Node, rank: int) -> Node | None:
    """What `node` reshapes from `rank` dimensions, the last two untouched: [B * H, T, S] and [B, H, T, S]."""
    x = node.args[0] if node.target is torch.reshape and len(node.users) == 1 else None
    if not isinstance(x, Node) or not is_float_tensor(x) or len(_shape(x)) != rank or "aliases" in x.meta:
        return None
    return x if _shape(x)[-2:] == _shape(node)[-2:] and len(_shape(node)) == 7 - rank else None


def _merged_masks(gm: GraphModule, before: Node, found: Scores) -> list[Node]:
    """The masks that are added to [B, H, T, S], for scores that are [B * H, T, S]."""
    masks = list(found.added[: found.outside])
    for i, mask in enumerate(masks):
        if len(_shape(mask)) > 2:  # others broadcast to either
            assert found.split is not None
            sizes, (t, s) = found.split.args[1], _shape(mask)[-2:]
            assert isinstance(sizes, tuple | list)
            with gm.graph.inserting_before(before):
                whole = call(gm, torch.broadcast_to, (mask, (*sizes[:2], -1, -1)), before)
                masks[i] = call(gm, torch.flatten, (whole, 0, 1), before)
            for new, shape in ((whole, _shape(found.split)[:2]), (masks[i], (math.prod(_shape(found.split)[:2]),))):
                new.meta.pop("source", None)
                new.meta["value"] = Value(torch.float32, (*shape, t, s))
    return masks


def _dropout(gm: GraphModule, node: Node) -> tuple[Node, float] | None:
    """What a dropout of a graph that is to be trained reads, and how much of it goes."""
    module = submodule(gm, node) if node.op == "call_module" else None
    if not isinstance(module, Dropout) or module.function is not F.dropout or len(node.users) > 1:
        return None
    x = node.args[0]
    assert isinstance(x, Node)
    return x, module.p


def _operands(node: Node) -> tuple[Any, ...]:
    """The operands of a product without keyword arguments; none where it has any."""
    return () if node.kwargs else node.args


def _swapped(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def _terms(node: Node) -> tuple[Node, Node, str, str, str] | None:
    """Operands and letters of an einsum of two float tensors, each letter once in a term and no ellipsis."""
    if node.target is not torch.einsum or node.kwargs or not isinstance(node.args[0], str):
        return None
    equation: str = node.args[0]
    operands: Sequence[Any] = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = operands[0]
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(operands) != 2 or not arrow or "." in equation or not all(map(is_float_tensor, operands)):
        return None
    a, b = operands
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return None
    return a, b, terms[0], terms[1], out


def _order(term: str, wanted: str) -> tuple[int, ...] | None:
    """The permutation that brings the letters of `term` into the order `wanted`; None where they are others."""
    return tuple(map(term.index, wanted)) if sorted(term) == sorted(wanted) else None


def _last_product(node: Node) -> tuple[Node, Operand, tuple[int, ...] | None] | None:
    """weights @ v: the weights, v as [..., S, E], and the order in which the result is wanted, None for its own."""
    if node.target in PRODUCTS and len(_operands(node)) == 2:
        p, v = node.args
        if is_float_tensor(p) and is_float_tensor(v):
            assert isinstance(p, Node) and isinstance(v, Node)
            return p, Operand(v, tuple(range(len(_shape(v))))), None
        return None
    terms = _terms(node)
    if terms is None:
        return None
    for p, v, of_p, of_v, out in (terms, (terms[1], terms[0], terms[3], terms[2], terms[4])):
        width = [letter for letter in of_v if letter not in of_p]
        order = _order(of_v, of_p[:-2] + of_p[-1:] + width[0]) if len(width) == 1 and len(of_p) > 2 else None
        back = _order(of_p[:-1] + width[0], out) if order is not None else None
        if order is not None and back is not None:
            return p, Operand(v, order), None if back == tuple(range(len(back))) else back
    return None


def _softmax_of(gm: GraphModule, node: Node) -> Node | None:
    """The scores whose softmax over the last dimension `node` is, read by one product alone."""
    while node.target in CASTS and len(node.users) == 1 and is_float_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]  # from float32 to float32
    if len(node.users) != 1:
        return None
    if node.op == "call_module":
        module = submodule(gm, node)
        dim: Any
        dtype: Any
        dim, dtype = (module.dim, None) if type(module) is nn.Softmax else (None, None)
    elif node.target in SOFTMAXES:
        positional = ("input", "dim", "_stacklevel", "dtype") if node.target is F.softmax else ("input", "dim", "dtype")
        named = _named(node, *positional)
        dim, dtype = named.get("dim"), named.get("dtype")
    else:
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    last = isinstance(x, Node) and is_float_tensor(x) and dim in (-1, len(_shape(x)) - 1)
    return x if last and dtype in (None, torch.float32) else None  # type: ignore[return-value]


def _scores(gm: GraphModule, node: object, outer: Scores) -> Scores | None:
    """What lies between the first product and its softmax; None where something else does, or others read of it."""
    if not isinstance(node, Node) or not is_float_tensor(node) or len(node.users) != 1:
        return None
    scaled = _scaled(gm, node, in_place=True)
    if scaled is not None:
        return _scores(gm, scaled[0], replace(outer, factors=(*outer.factors, scaled[1])))
    operands = _operands(node)
    if node.target in PLUS and len(operands) == 2:
        for x, mask in (operands, operands[::-1]):
            inner = outer.with_mask(added=(*outer.added, mask)) if is_float_tensor(mask) else None
            found = _scores(gm, x, inner) if inner is not None else None
            if found is not None:
                return found
        return None
    if node.target in FILLS and len(operands) == 3:
        x, mask, fill = operands[0], operands[1], _fill(gm, operands[2])
        inner = outer.with_mask(hidden=(*outer.hidden, (mask, fill))) if fill is not None and _is_bool(mask) else None
        return _scores(gm, x, inner) if inner is not None else None
    if node.target in CHOICES and len(operands) == 3:
        mask, a, b = operands if node.op == "call_function" else (operands[1], operands[0], operands[2])
        for x, other, side in ((a, b, "seen"), (b, a, "hidden")):
            fill = _fill(gm, other)
            if fill is not None and _is_bool(mask):
                inner = outer.with_mask(**{side: (*getattr(outer, side), (mask, fill))})
                return _scores(gm, x, inner) if inner is not None else None
        return None
    if (product := _regrouped(node, 3)) is not None:
        sizes = node.args[1]
        unknown = not isinstance(sizes, tuple | list) or -1 in sizes[:2]  # of those that a mask has to be repeated to
        if outer.hidden or outer.seen or outer.split is not None or (outer.added and unknown):
            return None
        return _scores(gm, product, replace(outer, split=node, outside=len(outer.added)))
    return _first_product(gm, node, outer)


def _first_product(gm: GraphModule, node: Node, outer: Scores) -> Scores | None:
    """q @ k^T, with k as [..., S, D]."""
    operands = _operands(node)
    if node.target in BIASED_PRODUCTS:
        named = {"beta": 1, "alpha": 1, **_named(node, "input", "batch1", "batch2")}
        mask, beta, alpha = named["input"], _number(gm, named["beta"]), _number(gm, named["alpha"])
        if not is_float_tensor(mask) or outer.factors or isinstance(beta, Node) or beta != 1 or alpha is None:
            return None
        scaled = () if not isinstance(alpha, Node) and alpha == 1 else ((alpha, False),)
        outer = replace(outer, added=(*outer.added, mask), factors=scaled)
        operands = named["batch1"], named["batch2"]
    elif node.target not in PRODUCTS:
        terms = _terms(node)
        if terms is None or len(terms[4]) < 3:
            return None
        a, b, of_a, of_b, out = terms
        if out[-2] not in of_a:
            a, b, of_a, of_b = b, a, of_b, of_a
        summed = [letter for letter in of_a if letter in of_b and letter not in out]
        if len(summed) != 1:
            return None
        order_a, order_b = _order(of_a, out[:-1] + summed[0]), _order(of_b, out[:-2] + out[-1] + summed[0])
        if order_a is None or order_b is None:
            return None
        return replace(outer, q=Operand(a, order_a), k=Operand(b, order_b), product=node)
    if len(operands) != 2 or not all(map(is_float_tensor, operands)):
        return None
    q, k = operands
    rank = len(_shape(k))
    if rank < 3 or len(_shape(q)) != rank:
        return None
    return replace(outer, q=Operand(q, tuple(range(rank))), k=Operand(k, _swapped(rank)), product=node)


def _is_bool(mask: object) -> bool:
    return is_tensor(mask) and isinstance(mask, Node) and mask.meta["value"].dtype == torch.bool


def _fill(gm: GraphModule, value: object) -> float | None:
    """The number that hides a score, where it is so low that nothing is left of the score."""
    number = _number(gm, value)
    return float(number) if isinstance(number, int | float) and number <= LEAST_FILL else None


def _fits(mask: tuple[int, ...], scores: tuple[int, ...]) -> bool:
    """Whether a mask broadcasts to the scores and leaves their shape."""
    pairs = zip(mask[::-1], scores[::-1], strict=False)
    return len(mask) <= len(scores) and all(size in (1, whole) for size, whole in pairs)


def _settled(gm: GraphModule, node: Node, product: Node) -> bool:
    """Whether nothing modifies `node` in place once the first product has been computed."""
    if "aliases" not in node.meta:
        return True
    names = [n.name for n in gm.graph.nodes]
    return node.meta["aliases"] in names and names.index(node.meta["aliases"]) < names.index(product.name)


def _mask(gm: GraphModule, before: Node, found: Scores) -> Node | None:
    """One mask of all: bool where there is one that hides with -inf, else the float sum of them."""
    bools = [*((mask, fill, True) for mask, fill in found.hidden), *((mask, fill, False) for mask, fill in found.seen)]

    def insert(target: Any, args: tuple[Any, ...]) -> Node:
        with gm.graph.inserting_before(before):
            new = call(gm, target, args, before)
        new.meta.pop("source", None)
        return new

    if len(bools) == 1 and not found.added and bools[0][1] == -torch.inf:
        mask, _, hides = bools[0]
        return insert(torch.logical_not, (mask,)) if hides else mask
    floats = [*found.added]
    for mask, fill, hides in bools:
        floats.append(insert(torch.where, (mask, fill, 0.0) if hides else (mask, 0.0, fill)))
    total = floats[0] if floats else None
    for mask in floats[1:]:
        total = insert(ADD, (total, mask))
    return total


PASS = RecognizeAttention()

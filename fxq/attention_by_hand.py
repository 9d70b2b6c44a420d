"""Attention that a model spells by hand: where it is in a graph, from its last product back to the first.

    softmax(q @ k^T [* c] [+ mask ...], -1) @ v

By hand means a softmax over the last dimension of scores that nobody else reads, nor the weights. `STEPS` says what may
lie between the first product and the softmax, in which spellings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any as AnyValue

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import STATE, Value, constant, is_float_tensor, is_tensor, submodule
from fxq.ops.dropout import Dropout
from fxq.pattern import Any, Match, Miss, Op, Pattern
from fxq.spelling import ADD, MUL

_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
_BIASED_PRODUCTS = frozenset({torch.baddbmm, "baddbmm"})
_SOFTMAXES = frozenset({F.softmax, torch.softmax, "softmax"})
_TIMES = frozenset({MUL, operator.mul})
_OVER = frozenset({operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "__truediv__"})
_FILLS = frozenset({torch.masked_fill, "masked_fill"})
_CASTS = frozenset({"to", "type_as", "float"})
LEAST_FILL = -1e9
"""Added to scores it leaves nothing of their differences; what fills with more does not become a mask."""

Factor = tuple[AnyValue, bool]
"""A number, or a node of one, and whether it divides."""

_SCALED: tuple[Pattern, ...] = (
    Op(_TIMES, Any("x"), Any("times")),
    Op(_TIMES, Any("times"), Any("x")),
    Op(_OVER, Any("x"), Any("over")),
)
STEPS: tuple[Pattern, ...] = (
    *_SCALED,
    Op({ADD}, Any("x"), Any("added")),
    Op({ADD}, Any("added"), Any("x")),
    Op(_FILLS, Any("x"), Any("hidden"), Any("fill")),
    Op({torch.where}, Any("seen"), Any("x"), Any("fill")),
    Op({torch.where}, Any("hidden"), Any("fill"), Any("x")),
    Op({"where"}, Any("x"), Any("seen"), Any("fill")),
    Op({"where"}, Any("fill"), Any("hidden"), Any("x")),
)
"""What may be done to scores x: times or over a number, a float mask added, a bool mask of what is hidden or seen."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and the order of its dimensions in which it is wanted."""

    node: Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in that order."""
        return tuple(shape_of(self.node)[i] for i in self.order)


@dataclass(frozen=True)
class Product:
    """q @ k^T at `node`: q as [..., T, D] and k as [..., S, D]."""

    node: Node
    q: Operand
    k: Operand


@dataclass(frozen=True)
class Scores:
    """What a softmax reads of `product`, None where that is not found yet.

    added: float masks. filled: bool masks, each with the number that fills what is not to be seen, and whether it is
    true there. split: the reshape of [B * H, T, S] to [B, H, T, S], where there is one; the first `outside` of `added`
    are added behind it. Operations are collected from the softmax inwards.
    """

    factors: tuple[Factor, ...] = ()
    added: tuple[Node, ...] = ()
    filled: tuple[tuple[Node, float, bool], ...] = ()
    product: Product | None = None
    split: Node | None = None
    outside: int = 0

    @property
    def masks(self) -> list[Node]:
        """All of them, the float ones first."""
        return [*self.added, *(mask for mask, *_ in self.filled)]


@dataclass(frozen=True)
class ByHand:
    """The parts of an attention: all operands [B, H, ...], or without heads.

    order: of the dimensions of the result, None for its own. dropout: of the weights, None where there is none.
    """

    product: Product
    scores: Scores
    v: Operand
    order: tuple[int, ...] | None
    dropout: float | None


def find(gm: GraphModule, node: Node) -> ByHand | None:
    """The attention whose result `node` is; None where there is something in it that its one spelling cannot say."""
    product = _last_product(node)
    if product is None:
        return None
    weights, v, order = product
    merged = _regrouped(weights, 4)
    weights = weights if merged is None else merged
    dropout = _dropout(gm, weights)
    if dropout is not None:
        weights, _ = dropout
    softmaxed = _softmax_of(gm, weights)
    scores = None if softmaxed is None else _scores(gm, softmaxed, Scores())
    if softmaxed is None or scores is None or scores.product is None or (scores.split is None) != (merged is None):
        return None
    first = scores.product
    shapes = first.q.shape, first.k.shape, v.shape
    if any(len(shape) not in (3, 4) or shape[:-2] != shapes[0][:-2] for shape in shapes):
        return None
    places = [softmaxed] * scores.outside + [first.node] * (len(scores.masks) - scores.outside)
    if not all(_fits(shape_of(mask), shape_of(place)) for mask, place in zip(scores.masks, places, strict=True)):
        return None
    if not all(_settled(gm, x, first.node) for x in (first.q.node, first.k.node, *scores.masks)):
        return None
    return ByHand(first, scores, v, order, None if dropout is None else dropout[1])


def named(node: Node, *names: str) -> dict[str, AnyValue]:
    """The operands by name, `names` those of the positional ones."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a tensor on the examples."""
    value = node.meta["value"]
    assert isinstance(value, Value)
    return value.shape


def scaled(gm: GraphModule, node: Node) -> tuple[Node, Factor] | None:
    """x and c of a node that is x * c or x / c, c a number."""
    for pattern in _SCALED:
        match = pattern.match(node)
        if isinstance(match, Match) and isinstance(match["x"], Node) and is_float_tensor(match["x"]):
            factor = _factor(gm, match.bound)
            if factor is not None:
                return match["x"], factor
    return None


def _factor(gm: GraphModule, bound: Mapping[str, object]) -> Factor | None:
    over = "over" in bound
    number = _number(gm, bound["over" if over else "times"])
    return None if number is None or (over and number == 0) else (number, over)


def _number(gm: GraphModule, value: object) -> AnyValue:
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


def _regrouped(node: Node, rank: int) -> Node | None:
    """What `node` reshapes from `rank` dimensions, the last two untouched: [B * H, T, S] and [B, H, T, S]."""
    x = node.args[0] if node.target is torch.reshape and len(node.users) == 1 else None
    if not isinstance(x, Node) or not is_float_tensor(x) or len(shape_of(x)) != rank or "aliases" in x.meta:
        return None
    return x if shape_of(x)[-2:] == shape_of(node)[-2:] and len(shape_of(node)) == 7 - rank else None


def _dropout(gm: GraphModule, node: Node) -> tuple[Node, float] | None:
    """What a dropout of a graph that is to be trained reads, and how much of it goes."""
    module = submodule(gm, node) if node.op == "call_module" else None
    if not isinstance(module, Dropout) or module.function is not F.dropout or len(node.users) > 1:
        return None
    x = node.args[0]
    assert isinstance(x, Node)
    return x, module.p


def _operands(node: Node) -> tuple[AnyValue, ...]:
    """The operands of a product without keyword arguments; none where it has any."""
    return () if node.kwargs else node.args


def swapped(rank: int) -> tuple[int, ...]:
    """The order that swaps the last two dimensions."""
    return (*range(rank - 2), rank - 1, rank - 2)


def _terms(node: Node) -> tuple[Node, Node, str, str, str] | None:
    """Operands and letters of an einsum of two float tensors, each letter once in a term and no ellipsis."""
    if node.target is not torch.einsum or node.kwargs or not isinstance(node.args[0], str):
        return None
    equation: str = node.args[0]
    operands: Sequence[AnyValue] = node.args[1:]
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
    if node.target in _PRODUCTS and len(_operands(node)) == 2:
        p, v = node.args
        if is_float_tensor(p) and is_float_tensor(v):
            assert isinstance(p, Node) and isinstance(v, Node)
            return p, Operand(v, tuple(range(len(shape_of(v))))), None
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
    while node.target in _CASTS and len(node.users) == 1 and is_float_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]  # from float32 to float32
    if len(node.users) != 1:
        return None
    if node.op == "call_module":
        module = submodule(gm, node)
        dim: AnyValue
        dtype: AnyValue
        dim, dtype = (module.dim, None) if type(module) is nn.Softmax else (None, None)
    elif node.target in _SOFTMAXES:
        positional = ("input", "dim", "_stacklevel", "dtype") if node.target is F.softmax else ("input", "dim", "dtype")
        given = named(node, *positional)
        dim, dtype = given.get("dim"), given.get("dtype")
    else:
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    last = isinstance(x, Node) and is_float_tensor(x) and dim in (-1, len(shape_of(x)) - 1)
    return x if last and dtype in (None, torch.float32) else None  # type: ignore[return-value]


def _scores(gm: GraphModule, node: object, outer: Scores) -> Scores | None:
    """What lies between the first product and its softmax; None where something else does, or others read of it."""
    if not isinstance(node, Node) or not is_float_tensor(node) or len(node.users) != 1:
        return None
    for step in STEPS:
        match = step.match(node)
        inner = _inside(gm, outer, match.bound) if isinstance(match, Match) else None
        found = None if inner is None or isinstance(match, Miss) else _scores(gm, match["x"], inner)
        if found is not None:
            return found
    if (product := _regrouped(node, 3)) is not None:
        sizes = node.args[1]
        unknown = not isinstance(sizes, tuple | list) or -1 in sizes[:2]  # of those that a mask has to be repeated to
        if outer.filled or outer.split is not None or (outer.added and unknown):
            return None
        return _scores(gm, product, replace(outer, split=node, outside=len(outer.added)))
    return _first_product(gm, node, outer)


def _inside(gm: GraphModule, outer: Scores, bound: Mapping[str, AnyValue]) -> Scores | None:
    """`outer` with what one of `STEPS` found; None where that is no factor and no mask."""
    if "times" in bound or "over" in bound:
        factor = _factor(gm, bound)
        return None if factor is None else replace(outer, factors=(*outer.factors, factor))
    if outer.factors:  # which would scale the mask
        return None
    if "added" in bound:
        return replace(outer, added=(*outer.added, bound["added"])) if is_float_tensor(bound["added"]) else None
    hides = "hidden" in bound
    mask, fill = bound["hidden" if hides else "seen"], _fill(gm, bound["fill"])
    return replace(outer, filled=(*outer.filled, (mask, fill, hides))) if fill is not None and _is_bool(mask) else None


def _first_product(gm: GraphModule, node: Node, outer: Scores) -> Scores | None:
    """q @ k^T, with k as [..., S, D]."""
    operands = _operands(node)
    if node.target in _BIASED_PRODUCTS:
        given = {"beta": 1, "alpha": 1, **named(node, "input", "batch1", "batch2")}
        mask, beta, alpha = given["input"], _number(gm, given["beta"]), _number(gm, given["alpha"])
        if not is_float_tensor(mask) or outer.factors or isinstance(beta, Node) or beta != 1 or alpha is None:
            return None
        scaled = () if not isinstance(alpha, Node) and alpha == 1 else ((alpha, False),)
        outer = replace(outer, added=(*outer.added, mask), factors=scaled)
        operands = given["batch1"], given["batch2"]
    elif node.target not in _PRODUCTS:
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
        return replace(outer, product=Product(node, Operand(a, order_a), Operand(b, order_b)))
    if len(operands) != 2 or not all(map(is_float_tensor, operands)):
        return None
    q, k = operands
    rank = len(shape_of(k))
    if rank < 3 or len(shape_of(q)) != rank:
        return None
    return replace(outer, product=Product(node, Operand(q, tuple(range(rank))), Operand(k, swapped(rank))))


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

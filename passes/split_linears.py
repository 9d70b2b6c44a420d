"""split_linears: a linear whose result is cut into q, k and v becomes one linear for each.

    q, k, v = linear(x, w, b).split(n, -1)                        -> linear(x, w[:n], b[:n]), linear(x, w[n:2n], ...)
    linear(x, w, b).reshape(B, T, 3, H, D).permute(...).unbind(0) -> three linears, reshaped to (B, T, 1, H, D), ...

What integers are cut from shares one scale, and v is often far smaller than q and k: apart, each has a range of its
own. Only where parts reach an attention by moves alone, and nobody reads the whole. Whether the moves of a part are
those of the whole is tried on tensors that hold the numbers of the channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxq.graph import Value, bypass, call, constant, get_attr, is_size, set_constant
from fxq.pipeline import Context, Numbers
from fxq.spelling import ATTENTION, GETITEM, LINEAR, MOVES, SPLITS
from fxq.stages import Stage


@dataclass(frozen=True)
class SplitLinears:
    """See the module's docstring. views: whether the parts lie in the memory of the whole, which gradients reach."""

    name: str = "split-linears"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING
    views: bool = False

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of linears split."""
        found = dict.fromkeys(
            linear
            for node in gm.graph.nodes
            if node.target is ATTENTION
            for operand in node.args[:3]
            if (linear := _source(operand)) is not None
        )
        return sum(_split(gm, linear, self.views) for linear in found)


def _source(node: object) -> Node | None:
    """The linear that `node` is moved and cut from."""
    while isinstance(node, Node) and node.target in MOVES | SPLITS | {GETITEM}:
        node = node.args[0]
    return node if isinstance(node, Node) and node.target is LINEAR else None


@dataclass(frozen=True)
class Part:
    """What is cut out of a whole: the moves on the way, the node that cuts, its channels [begin, end)."""

    moves: tuple[Node, ...]
    cut: Node
    begin: int
    end: int


def _split(gm: GraphModule, linear: Node, views: bool) -> bool:
    x, w, b = linear.args
    if not all(c is None or (isinstance(c, Node) and c.op == "get_attr") for c in (w, b)) or "aliases" in linear.meta:
        return False
    assert isinstance(w, Node)
    shape = _shape(linear)
    whole = torch.arange(shape[-1]).expand(shape)
    paths = list(_paths(linear, ()))
    if len(paths) < 2 or any(path is None for path in paths):
        return False
    parts, ways = [], []
    for path in paths:
        assert path is not None
        part = _part(path, whole)
        way = None if part is None else _way(part, whole)
        if part is None or way is None:
            return False
        parts.append(part)
        ways.append(way)
    for part, way in zip(parts, ways, strict=True):
        with gm.graph.inserting_before(part.cut):
            constants = [None if c is None else _rows(gm, c, part, views) for c in (w, b)]  # type: ignore[arg-type]
            node = call(gm, LINEAR, (x, *constants), linear)
            for target, args in way:
                node = call(gm, target, (node, *args), part.cut)
        node.meta["value"] = part.cut.meta["value"]
        bypass(gm, part.cut, node)
    return True


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta["value"]
    assert isinstance(value, Value)
    return value.shape


def _rows(gm: GraphModule, node: Node, part: Part, views: bool) -> Node:
    rows = constant(gm, node).detach()[part.begin : part.end]
    rows = rows if views else rows.clone()  # `balance` scales what has one reader
    return get_attr(gm, set_constant(gm, f"{node.target}_part", rows), node)


def _paths(node: Node, moves: tuple[Node, ...]) -> Iterator[tuple[Node, ...] | None]:
    """The ways from a linear to each node that cuts, both left out and put at the end; None where others read."""
    for user in list(node.users):
        if user.target in SPLITS and not user.kwargs:
            for piece in list(user.users):
                if piece.target is GETITEM:
                    yield (*moves, user, piece)
                elif is_size(piece) and isinstance(user.meta["value"], tuple | list):
                    _know(piece, len(user.meta["value"]))
                else:
                    yield None
        elif user.target in (torch.select, GETITEM) and not user.kwargs:
            yield (*moves, user)
        elif user.target in MOVES and not user.kwargs and "aliases" not in user.meta:
            yield from _paths(user, (*moves, user))
        else:
            yield None


def _know(length: Node, count: int) -> None:
    """Let the readers of the number of pieces, which is no matter of data, read a number."""
    if length.meta.get("value") == count:
        for reader in list(length.users):
            reader.args = map_arg(reader.args, lambda n: count if n is length else n)
            reader.kwargs = map_arg(reader.kwargs, lambda n: count if n is length else n)
        length.graph.erase_node(length)


def _plain(args: Any) -> Any:
    """Operands with the values that sizes had on the examples."""
    return map_arg(args, lambda n: n.meta["value"])


def _run(target: Any, x: Any, args: Any) -> Any:
    return target(x, *_plain(args))


def _part(path: tuple[Node, ...], whole: Tensor) -> Part | None:
    """Which channels a path cuts out; None where they are not some neighbours, each at every place."""
    value: Any = whole
    for node in path:
        value = _run(node.target, value, node.args[1:])
    if not isinstance(value, Tensor) or not value.numel():
        return None
    begin, end = int(value.min()), int(value.max()) + 1
    places = whole.numel() // whole.shape[-1]
    if (
        value.numel() != places * (end - begin)
        or torch.unique(value).numel() != end - begin
        or end - begin == whole.shape[-1]
    ):
        return None
    last = 2 if len(path) > 1 and path[-2].target in SPLITS else 1
    return Part(path[:-last], path[-1], begin, end)


def _way(part: Part, whole: Tensor) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """The moves of a part by itself: those of the whole, with its own number of channels or a dimension of one."""
    channels, count = whole.shape[-1], part.end - part.begin
    own, wanted = whole[..., part.begin : part.end], whole
    for node in (*part.moves, *_cutters(part)):
        wanted = _run(node.target, wanted, node.args[1:])
    moves: list[tuple[Any, tuple[Any, ...]]] = [(node.target, node.args[1:]) for node in part.moves]
    tails = _tails(part)
    changes: list[list[tuple[Any, tuple[Any, ...]]]] = [moves]
    for i, (target, args) in enumerate(moves):
        if target in (torch.reshape, torch.unflatten):
            *before, sizes = args
            for j, size in enumerate(sizes if isinstance(sizes, tuple | list) else ()):
                for old, new in ((channels, count), (channels // count, 1)):
                    if isinstance(size, int) and size == old:
                        changed = (target, (*before, (*sizes[:j], new, *sizes[j + 1 :])))
                        changes.append([*moves[:i], changed, *moves[i + 1 :]])
    for change in changes:
        for tail in tails:
            value: Any = own
            try:
                for target, args in (*change, *tail):
                    value = _run(target, value, args)
            except (RuntimeError, IndexError):
                continue
            if value.shape == wanted.shape and torch.equal(value, wanted):
                return [*change, *tail]
    return None


def _cutters(part: Part) -> tuple[Node, ...]:
    source = part.cut.args[0]
    assert isinstance(source, Node)
    return (source, part.cut) if source.target in SPLITS else (part.cut,)


def _tails(part: Part) -> list[list[tuple[Any, tuple[Any, ...]]]]:
    """What cutting is where there is one part only: nothing, or taking the first of one."""
    cutters = _cutters(part)
    first = cutters[0]
    if len(cutters) == 2:
        if first.target is not torch.unbind:
            return [[]]
        dim = first.args[1] if len(first.args) > 1 else 0
        return [[(torch.select, (dim, 0))]]
    if first.target is torch.select:
        return [[(torch.select, (first.args[1], 0))]]
    return [[(GETITEM, (0,))]] if isinstance(first.args[1], int) else [[]]


PASS = SplitLinears()
TRAINABLE = SplitLinears(views=True)

"""What runs as one call taken apart, with its names.

`qimages`, `qblock`, `qchain`, `qlinears`, `qfeed_forward` and `qgate` are such calls.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.errors import InputError
from fxq.graph import STATE, Value, bypass, constant, drop_unread, get_attr, set_constant
from fxq.ops import block, images
from fxq.ops.activation import qlinear_act
from fxq.ops.block import Constant, qblock
from fxq.ops.chain import decode, qchain, qchain_float
from fxq.ops.conv import qconv, qconv_act_quantize
from fxq.ops.feed_forward import qfeed_forward
from fxq.ops.gate import qgate
from fxq.ops.images import qimages
from fxq.ops.linear import qlinear, qlinear_float
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.ops.linears import qlinears
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool
from fxq.qdq import quantize
from fxq.qtypes import ACT_QMAX, ACT_QMIN
from fxq.spelling import GETITEM


@dataclass(frozen=True)
class Link:
    """What a call of several operations has swallowed: of one of them its node's name, of a constant its path; meta."""

    name: str
    origin: Any
    source: str | None
    value: Value
    qparams: tuple[float, int] | None

    @classmethod
    def of(cls, node: Node) -> Link:
        """The link that `node` becomes."""
        name, meta = str(node.target) if node.op == "get_attr" else node.name, node.meta
        return cls(name, meta.get("origin"), meta.get("source"), meta["value"], meta.get("qparams"))

    def meta(self) -> dict[str, Any]:
        """A node's meta again."""
        return {key: value for key, value in vars(self).items() if key != "name" and value is not None}


def summary(gm: GraphModule, node: Node) -> list[tuple[str, str, str]]:
    """What a call runs, for each operation: its node's name, the op, and `16 -> 64, scale, zero point`."""
    links = list(node.meta["inside"])
    if node.target is qblock:
        return _lines(gm, node)
    if node.target is qimages:
        return _network(node)
    if node.target is qfeed_forward:
        x = node.args[0]
        assert isinstance(x, Node)
        widths = [value.shape[-1] for value in (x.meta["value"], links[0].value, links[1].value)]
        return [
            (links[0].name, "qlinear_act", f"{widths[0]} -> {widths[1]}, {node.args[4]}"),
            (links[1].name, "qlinear_dynamic", f"{widths[1]} -> {widths[2]}"),
        ]
    if node.target is qgate:
        channels, squeezed, *_ = (link.value.shape[1] for link in links)
        hidden = ("qconv_act_quantize", f", {node.args[7]}") if node.args[7] else ("qconv", "")
        return [
            (links[0].name, "qadaptive_avg_pool", "1"),
            (links[1].name, hidden[0], f"{channels} -> {squeezed}{hidden[1]}"),
            (links[2].name, "qconv_act_quantize", f"{squeezed} -> {channels}, {node.args[15]}"),
            (links[3].name, "qmul", f"{channels}"),
        ]
    _, program = node.args
    assert isinstance(program, Node)
    chain = decode(constant(gm, program))
    lines = []
    if chain.quantize is not None:
        lines.append((links.pop(0).name, "quantize", f"{chain.quantize.scale:.3g}, {chain.quantize.zero_point}"))
    for layer, link in zip(chain.layers, links, strict=True):
        text = f"{layer.in_features} -> {layer.out_features}"
        if link.qparams is None:
            lines.append((link.name, "qlinear_float", text))
        else:
            bounds = f", {layer.low}..{layer.high}" if (layer.low, layer.high) != (ACT_QMIN, ACT_QMAX) else ""
            lines.append((link.name, "qlinear", f"{text}, {link.qparams[0]:.3g}, {layer.zero_point}{bounds}"))
    return lines


def _lines(gm: GraphModule, node: Node) -> list[tuple[str, str, str]]:
    """What a block runs: one line for each operation, with the widths of what it reads and gives."""
    inputs, program, *_ = node.args
    assert isinstance(inputs, list | tuple) and isinstance(program, Node)
    values: list[Any] = [x.meta["value"] for x in inputs if isinstance(x, Node)]
    read = block.decode(constant(gm, program))
    lines, links = [], itertools.islice(node.meta["inside"], len(read.constants), None)
    for step in read.steps:
        link = next(links)
        values.append(link.value)
        if step.op == "part":
            continue
        if step.op == "qfeed_forward":
            wide, narrow = next(links), next(links)
            width, middle = values[step.args[0].index].shape[-1], wide.value.shape[-1]
            lines.append((wide.name, "qlinear_act", f"{width} -> {middle}, {step.args[4]}"))
            lines.append((narrow.name, "qlinear_dynamic", f"{middle} -> {link.value.shape[-1]}"))
            continue
        given = link.value if isinstance(link.value, tuple | list) else [link.value]
        widths = " + ".join(str(value.shape[-1]) for value in (given if step.op == "qlinears" else given[:1]))
        notes = [arg for arg in step.args if isinstance(arg, str)]
        notes += [f"{step.args[-1]} heads"] if step.op == "qattention" else []
        text = ", ".join([f"{values[step.args[0].index].shape[-1]} -> {widths}", *notes])
        lines.append((link.name, step.op, text))
    return lines


def _network(node: Node) -> list[tuple[str, str, str]]:
    """What a `qimages` runs: one line for each operation, with channels, window and activation."""
    inputs, constants, program = node.args
    assert isinstance(inputs, list | tuple) and isinstance(program, str)
    lines, links = [], iter(node.meta["inside"])

    def noted(op: str, args: list[Any]) -> Any:
        link = next(links)
        if op == "qgate":
            list(itertools.islice(links, 4))
        x = args[0] if isinstance(args[0], Value) else args[0][0]
        dim = 1 if len(link.value.shape) > 2 else -1
        texts = [f"{x.shape[dim]} -> {link.value.shape[dim]}", *(arg for arg in args if isinstance(arg, str) and arg)]
        lines.append((link.name, op, ", ".join(texts)))
        return link.value

    values = [x.meta["value"] for x in (*inputs, *constants) if isinstance(x, Node)]  # type: ignore[misc]
    images.walk(program, values[: len(inputs)], values[len(inputs) :], noted)
    return lines


def expand_blocks(gm: GraphModule) -> GraphModule:
    """`gm` with the operations of its blocks and networks as nodes of their own, some of them of several again."""
    expanded = GraphModule(gm, copy.deepcopy(gm.graph))
    expanded.meta[STATE] = gm.meta.get(STATE, ())
    for node in expanded.graph.find_nodes(op="call_function", target=qimages):
        _operations(expanded, node)
    for node in expanded.graph.find_nodes(op="call_function", target=qblock):
        _steps(expanded, node)
    drop_unread(expanded)
    return expanded


def expand(gm: GraphModule) -> GraphModule:
    """The same bits with every layer as one op; shares the constants of `gm`, which stays as it is.

    What a call of either modifies is the same memory, and known of both (`find_state`).
    """
    if not isinstance(gm, GraphModule):
        raise InputError(f"fxq.expand takes what fxq.quantize returns, not a {type(gm).__name__}")
    expanded = expand_blocks(gm)
    for node in list(expanded.graph.nodes):
        if node.target in (qchain, qchain_float):
            _expand(expanded, node)
        elif node.target is qlinears:
            _part(expanded, node)
        elif node.target is qfeed_forward:
            _both(expanded, node)
        elif node.target is qgate:
            _gate(expanded, node)
    expanded.recompile()
    return expanded


def _part(gm: GraphModule, node: Node) -> None:
    """The linears that a `qlinears` runs, each with the name and the meta of what takes its result out."""
    x, *lists = node.args
    for part in list(node.users):
        each = part.args[1]
        assert isinstance(each, int)
        with gm.graph.inserting_before(part):
            own = gm.graph.call_function(qlinear, (x, *(values[each] for values in lists)))  # type: ignore[index]
        own.meta = dict(part.meta)
        name = part.name
        bypass(gm, part, own)
        own.name = name


def _operations(gm: GraphModule, node: Node) -> None:
    """The operations that a `qimages` runs."""
    inputs, constants, program = node.args
    assert isinstance(inputs, list | tuple) and isinstance(constants, list | tuple) and isinstance(program, str)
    links = iter(node.meta["inside"])

    def made(op: str, args: list[Any]) -> Node:
        step = _node(gm, images.target(op), tuple(args), next(links))
        if step.target is qgate:
            step.meta["inside"] = tuple(itertools.islice(links, 4))
        return step

    with gm.graph.inserting_before(node):
        results = images.walk(program, inputs, constants, made)
    for result in list(node.users):
        bypass(gm, result, results[result.args[1]])  # type: ignore[index]


def _steps(gm: GraphModule, node: Node) -> None:
    """The operations that a `qblock` runs."""
    inputs, program, memory, _ = node.args
    assert isinstance(inputs, list | tuple) and isinstance(program, Node) and isinstance(memory, Node)
    read = block.decode(constant(gm, program))
    links = iter(node.meta["inside"])
    with gm.graph.inserting_before(node):
        constants = [_constant(gm, next(links), place.of(constant(gm, memory))) for place in read.constants]
    values: list[Any] = list(inputs)

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return [argument(item) for item in value]
        if isinstance(value, block.Value):
            return values[value.index]
        return constants[value.index] if isinstance(value, Constant) else value

    made: list[Node] = []
    with gm.graph.inserting_before(node):
        for step in read.steps:
            link = next(links)
            target = GETITEM if step.op == "part" else block.overload(step.op)
            made.append(_node(gm, target, tuple(map(argument, step.args)), link))
            values.append(made[-1])
            if step.op == "qfeed_forward":
                made[-1].meta["inside"] = next(links), next(links)
    for result in list(node.users):
        i, part = read.results[result.args[1]]  # type: ignore[index]
        whole = made[i]
        parts = (user for user in whole.users if user.target is GETITEM and user.args[1] == part)
        bypass(gm, result, next(parts) if read.steps[i].op in _SEVERAL else whole)


def _constant(gm: GraphModule, link: Link, tensor: Tensor) -> Node:
    """The constant at its path again, where it still stands if others read it as well."""
    known = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    path = link.name if link.name in known else set_constant(gm, link.name, tensor)
    node = gm.graph.create_node("get_attr", path)
    node.meta = link.meta()
    return node


_SEVERAL = frozenset({"qlinears", "norm_and_quantize"})


def _both(gm: GraphModule, node: Node) -> None:
    """The two linears that a `qfeed_forward` runs."""
    first, second = node.meta["inside"]
    with gm.graph.inserting_before(node):
        wide = _node(gm, qlinear_act, node.args[:5], first)
        bypass(gm, node, _node(gm, qlinear_dynamic, (wide, *node.args[5:]), second))


def _gate(gm: GraphModule, node: Node) -> None:
    """The mean, the two convolutions and the product that a `qgate` runs."""
    x, z_x, mean, z_mean, *rest = node.args
    links = node.meta["inside"]
    ones = (1,) * (len(links[0].value.shape) - 2)
    window = "x".join(map(str, ones))
    first, (activation, scale, z_hidden, *bounds), second, last = rest[:3], rest[3:8], rest[8:11], rest[11:]
    with gm.graph.inserting_before(node):
        squeezed = _node(gm, qadaptive_avg_pool, (x, ones, z_x, mean, z_mean, ACT_QMIN, ACT_QMAX), links[0])
        if activation:
            operands = (squeezed, *first, window, z_mean, activation, scale, z_hidden)
            hidden = _node(gm, qconv_act_quantize, operands, links[1])
        else:
            hidden = _node(gm, qconv, (squeezed, *first, window, z_mean, z_hidden, *bounds), links[1])
        gate, scale_gate, z_gate, m, *epilogue = last
        gates = _node(gm, qconv_act_quantize, (hidden, *second, window, z_hidden, gate, scale_gate, z_gate), links[2])
        bypass(gm, node, _node(gm, qmul, (x, gates, m, z_x, z_gate, *epilogue), links[3]))


def _expand(gm: GraphModule, node: Node) -> None:
    x, program = node.args
    assert isinstance(program, Node)
    chain = decode(constant(gm, program))
    links = list(node.meta["inside"])
    with gm.graph.inserting_before(node):
        if chain.quantize is not None:
            x = _node(gm, quantize, (x, chain.quantize.scale, chain.quantize.zero_point), links.pop(0))
        for layer, link in zip(chain.layers, links, strict=True):
            last_float = chain.to_float and layer is chain.layers[-1]
            owner = link.origin.module if link.origin is not None else ""
            constants = [
                get_attr(gm, set_constant(gm, f"{owner}.{name}".lstrip("."), tensor), node)
                for name, tensor in (
                    ("weight_packed", layer.weight),
                    ("bias_i32", layer.bias),
                    ("multiplier", layer.multiplier),
                )
            ]
            if last_float:
                x = _node(gm, qlinear_float, (x, *constants), link)
            else:
                x = _node(gm, qlinear, (x, *constants, layer.zero_point, layer.low, layer.high), link)
    assert isinstance(x, Node)
    bypass(gm, node, x)


def _node(gm: GraphModule, target: Any, args: tuple[Any, ...], link: Link) -> Node:
    node = gm.graph.create_node("call_function", target, args, name=link.name)
    node.meta = link.meta()
    return node

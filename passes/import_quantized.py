"""import_quantized: stand-ins of what torch has quantized become quantize/dequantize pairs around float operations.

    Quantize(x)              ->  dequantize(quantize(x, s, z), s, z)
    Product(x)               ->  the same around relu(linear(x, dequantize_weight(q_w, s_w), b)), or a convolution
    DynamicProduct(x)        ->  relu(linear(fake_quantize_rows(x), dequantize_weight(q_w, s_w), b))
    Binary(a, b)             ->  the same around add, mul; cat(...) of operands that have the result's scale
    reshape, relu, ... of x  ->  the same around it, with the scale of x: integers pass through
    average pooling of x     ->  likewise, rounded as docs/numerics.md has it
    DeQuantize(x)            ->  x

A weight with zero points is q_w - z_w, whose integers reach from -255 to 255. Where they leave int8, they are split in
two, q_w - z_w = a + b, and multiply the same input twice: linear(cat([x, x]), [a, b]); of a convolution that is the
channels of each group. The sums stay exact.

`fused`: quantizes of float inputs are marked for the rounding that torch's have (`fxq.engine`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.decisions import Decision, Form, Reason
from fxq.engine import AFFINE, FUSED, SCALES, STEPS
from fxq.errors import QuantizationError
from fxq.family import Claim
from fxq.graph import (
    bypass,
    call,
    get_attr,
    is_call,
    is_float_tensor,
    is_size,
    line_of,
    module_of,
    place_of,
    set_constant,
    submodule,
    target_name,
)
from fxq.macs import count_macs
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, quantize
from fxq.qtypes import ACT_QMAX
from fxq.spelling import ADAPTIVE_AVG_POOLS, LINEAR, RELU
from fxq.stages import Stage
from fxq.torch_quantized import Binary, DeQuantize, DynamicProduct, Product, Quantize, StandIn

Grid = tuple[float, int]


@dataclass(frozen=True)
class ImportQuantized:
    """See the module's docstring."""

    name: str = "import-quantized"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.QDQ
    numbers: Numbers = Numbers.ONE_STEP  # a cat of several scales rounds
    fused: bool = False

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Raises `QuantizationError` naming the first operation that reads integers and has no integer form."""
        for node in gm.graph.nodes:
            node.meta["source"] = node.name
        grids: dict[Node, Grid] = {}
        released: set[tuple[Node, Node]] = set()
        decisions: list[Decision] = []
        count = 0
        for node in list(gm.graph.nodes):
            if not is_call(node):
                continue
            module = submodule(gm, node) if node.op == "call_module" else None
            if isinstance(module, DeQuantize) or _is_dequantize(node):
                x = node.all_input_nodes[0]
                released.update((x, user) for user in node.users)
                bypass(gm, node, x)
                count += 1
                continue
            held = [x for x in node.all_input_nodes if x in grids and (x, node) not in released]
            if isinstance(module, DynamicProduct):
                if held:
                    raise QuantizationError(f"{place_of(node)} takes float tensors, and %{held[0].name} is quantized")
                with gm.graph.inserting_before(node):
                    bypass(gm, node, _product(gm, node, module, None))
                decisions.append(_decision(node, target_name(module.function), "int8", scheme="w8a8-dynamic"))
                count += 1
            elif isinstance(module, StandIn):
                pair = _expand(gm, node, module, grids, held, self.fused)
                grids[pair] = module.scale, module.zero_point
                if not isinstance(module, Quantize):
                    op = target_name(getattr(module, "function", type(module).__name__))
                    decisions.append(_decision(node, op, "int8"))
                bypass(gm, node, pair)
                count += 1
            elif held and node.target is torch.cat:
                grid = grids[held[0]]  # torch brings all to the scale of the first
                pair = _cat(gm, node, grid, held)
                grids[pair] = grid
                decisions.append(_decision(node, "cat", "moved"))
                bypass(gm, node, pair)
                count += 1
            elif held and not is_size(node):
                carried = _carry(gm, node, ctx, grids, held, self.fused)
                grids[carried] = grids[held[0]]
                decisions.append(_decision(node, target_name(node.target), "moved"))
                count += carried is not node
            else:
                aside = not is_float_tensor(node)
                reason = Reason.NON_FLOAT if aside else Reason.NO_INTEGER_OP
                decisions.append(_decision(node, target_name(node.target), "aside" if aside else "float", reason))
        macs = {node.meta["source"]: n for node, n in count_macs(gm, ctx.examples).items()}
        ctx.report.decisions = [dataclasses.replace(d, macs=macs.get(d.node, 0)) for d in decisions]
        return count


def _is_dequantize(node: Node) -> bool:
    return node.target == "dequantize" or node.target is torch.dequantize


def _decision(node: Node, op: str, form: Form, reason: Reason | None = None, scheme: str = "") -> Decision:
    return Decision(node.name, module_of(node), line_of(node), op, form, reason, scheme=scheme)


def _pair(gm: GraphModule, x: Node, grid: Grid, like: Node) -> Node:
    """dequantize(quantize(x)), at the insertion point."""
    return call(gm, dequantize, (call(gm, quantize, (x, *grid), like, grid), *grid), like)


def _expand(
    gm: GraphModule, node: Node, module: StandIn, grids: dict[Node, Grid], held: list[Node], fused: bool
) -> Node:
    """The pair that stands for a stand-in's call."""
    grid = module.scale, module.zero_point
    operands = node.all_input_nodes
    if not isinstance(module, Quantize) and len(held) != len(operands):
        floats = [x.name for x in operands if x not in held]
        raise QuantizationError(f"{place_of(node)} takes quantized tensors, and %{floats[0]} is not quantized")
    with gm.graph.inserting_before(node):
        if isinstance(module, Quantize):
            pair = _pair(gm, operands[0], grid, node)
            if fused:
                pair.all_input_nodes[0].meta[FUSED] = True
            return pair
        if isinstance(module, Product):
            return _pair(gm, _product(gm, node, module, grids[operands[0]]), grid, node)
        assert isinstance(module, Binary)
        if module.function is torch.cat:
            return _cat(gm, node, grid, held)
        y = call(gm, module.function, node.args, node)
        return _pair(gm, call(gm, RELU, (y,), node) if module.relu else y, grid, node)


def _cat(gm: GraphModule, node: Node, grid: Grid, held: list[Node]) -> Node:
    """The pair of a cat, whose operands are brought to the scale of the result first."""
    pieces, *dim = node.args
    assert isinstance(pieces, list | tuple)
    if len(held) != len(node.all_input_nodes):
        raise QuantizationError(f"{place_of(node)}: cat takes quantized tensors, and not all of its operands are")
    with gm.graph.inserting_before(node):
        scaled = [_pair(gm, piece, grid, node) for piece in pieces if isinstance(piece, Node)]
        return _pair(gm, call(gm, torch.cat, (scaled, *(dim or (0,))), node), grid, node)


def _product(gm: GraphModule, node: Node, module: Product, grid: Grid | None) -> Node:
    """The product of a stand-in's call, with its relu; grid: of its input, None where each row finds its own."""
    x, path = node.all_input_nodes[0], str(node.target)
    w = module.weight
    if ACT_QMAX * int(w.abs().sum(tuple(range(1, w.dim())), dtype=torch.int64).max()) >= 2**31:
        raise QuantizationError(f"{place_of(node)}: its dot product of {w[0].numel()} weights can leave int32")
    if w.min() < -128 or w.max() > 127:
        half = w.div(2, rounding_mode="floor")
        w = torch.cat([half, w - half], 1)
        x = _twice(gm, x, node, grid, -1 if module.function is LINEAR else 1, module.groups)
    if isinstance(module, DynamicProduct):
        x = call(gm, fake_quantize_rows, (x,), node)
        x.meta[STEPS] = ACT_QMAX // 2 if module.reduce_range else ACT_QMAX
    integers = get_attr(gm, set_constant(gm, f"{path}.weight_int8", w.to(torch.int8).contiguous()), node)
    scales = get_attr(gm, set_constant(gm, f"{path}.weight_scale", module.scales.float()), node)
    weight = call(gm, dequantize_weight, (integers, scales), node)
    weight.meta[SCALES] = module.scales.numpy()
    weight.meta[AFFINE] = module.affine
    bias = None if module.bias is None else get_attr(gm, f"{path}.bias", node)
    y = call(gm, module.function, (x, weight, bias, *module.settings), node)
    return call(gm, RELU, (y,), node) if module.relu else y


def _twice(gm: GraphModule, x: Node, node: Node, grid: Grid | None, dim: int, groups: int) -> Node:
    """cat([x, x], dim), group by group: of channels in groups, each group's beside themselves."""

    def moved(function: Any, *args: Any) -> Node:
        y = call(gm, function, args, node)
        return y if grid is None else _pair(gm, y, grid, node)

    if groups == 1:
        return moved(torch.cat, [x, x], dim)
    split = moved(torch.unflatten, x, 1, (groups, -1))
    return moved(torch.flatten, moved(torch.cat, [split, split], 2), 1, 2)


def _is_ones(sizes: Any) -> bool:
    return all(size == 1 for size in sizes)


def _carry(gm: GraphModule, node: Node, ctx: Context, grids: dict[Node, Grid], held: list[Node], fused: bool) -> Node:
    """The value of an operation that integers pass through: several as they are, a tensor in a pair of its own."""
    claims = (family.claim(gm, node) for family in ctx.families)
    claim = next((claim for claim in claims if claim is not None), None)
    averages = isinstance(claim, Claim) and claim.kind == "pointwise" and len(claim.inputs) == 1
    averages = averages and not (isinstance(claim, Claim) and claim.to_float)  # torch chooses a function's scale
    if fused and averages and not (node.target in ADAPTIVE_AVG_POOLS and _is_ones(node.args[1])):
        raise QuantizationError(
            f"{place_of(node)}: exact= covers no average but an adaptive pool to one pixel: how torch rounds others "
            "depends on where a value lies in memory; import it with exact=None"
        )
    if not averages and not (isinstance(claim, Claim) and claim.kind == "carry"):
        raise QuantizationError(
            f"{place_of(node)}: {target_name(node.target)} reads the quantized %{held[0].name} and has no integer form "
            "here; dequantize before it"
        )
    if len({grids[x] for x in held}) > 1 or len(held) < len([x for x in node.all_input_nodes if is_float_tensor(x)]):
        raise QuantizationError(f"{place_of(node)}: {target_name(node.target)} ties tensors of different scales")
    if not is_float_tensor(node):
        return node
    grid = grids[held[0]]
    with gm.graph.inserting_after(node):
        q = call(gm, quantize, (node, *grid), node, grid)
    with gm.graph.inserting_after(q):
        pair = call(gm, dequantize, (q, *grid), node)
    node.replace_all_uses_with(pair, delete_user_cb=lambda user: user is not q)
    return pair


PASS = ImportQuantized()
EXACT = ImportQuantized(fused=True)

"""use_fixed_point: under `Recipe(requant="fixed")` no integer meets a float multiply on its way to the next integer op.

    qlinear(x, w, b, multiplier, ...)           ->  qlinear_fixed(x, w, b, multiplier, shift, ..., rounding)
    qconv, qconv_transpose(x, w, b, ...)        ->  qconv_fixed, qconv_transpose_fixed(x, w, b, multiplier, shift, ...)
    qavg_pool, qadaptive_avg_pool(x, ...)       ->  qavg_pool_fixed, qadaptive_avg_pool_fixed(x, ..., rounding)
    requantize(q, z_x, multiplier, ...)         ->  requantize_fixed(q, z_x, multiplier, shift, ..., rounding)
    qadd(a, b, m_a, z_a, m_b, z_b, ...)         ->  qadd_fixed(a, b, m_a, z_a, m_b, z_b, shift, ...)
    qmul(a, b, m, z_a, z_b, ...)                ->  qmul_fixed(a, b, z_a, z_b, multiplier, shift, ..., rounding)
    qupsample_bilinear(x, size, scales, ...)    ->  qupsample_bilinear_fixed(x, size, steps, ...)

Multipliers are made of the scales themselves, in float64, not of their float32 quotients. What remains float is written
into the report (`Report.float_steps`): all arithmetic on real numbers but the conversions at the model's own edges, a
quantize that reads an input and a dequantize (or a product's, in `qlinear_float`) that an output reads. Operations that
move numbers or compare them are no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.graph import Value, constant, get_attr, is_call, module_of, place_of, replace, set_constant, target_name
from fxq.ops.add import qadd
from fxq.ops.conv import qconv, qconv_fixed, qconv_float
from fxq.ops.conv_transpose import qconv_transpose, qconv_transpose_fixed, qconv_transpose_float
from fxq.ops.fixed_point import qadd_fixed, qlinear_fixed, qmul_fixed, requantize_fixed
from fxq.ops.linear import qlinear, qlinear_float
from fxq.ops.lookup import lookup, lookup_channels
from fxq.ops.mul import qmul
from fxq.ops.pool import (
    MOST_COUNTED,
    qadaptive_avg_pool,
    qadaptive_avg_pool_fixed,
    qavg_pool,
    qavg_pool_fixed,
    qmax_pool,
)
from fxq.ops.quantize_scaled import quantize_scaled
from fxq.ops.upsample import qupsample_bilinear, qupsample_bilinear_fixed, qupsample_nearest
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, quantize, requantize
from fxq.recipe import RequantRounding
from fxq.spelling import CAT, CLAMP, GETITEM, MAX_POOLS, MOVES, RELU, SPLITS
from fxq.stages import Stage, is_integer_op

_PRODUCTS: dict[object, OpOverload] = {
    qlinear: qlinear_fixed,
    qconv: qconv_fixed,
    qconv_transpose: qconv_transpose_fixed,
}
_POOLS: dict[object, OpOverload] = {qavg_pool: qavg_pool_fixed, qadaptive_avg_pool: qadaptive_avg_pool_fixed}
_INTEGER_ONLY = frozenset(
    {
        *_PRODUCTS.values(),
        *_POOLS.values(),
        qadd_fixed,
        qmul_fixed,
        requantize_fixed,
        qmax_pool,
        qupsample_nearest,
        qupsample_bilinear_fixed,
        lookup,
        lookup_channels,
    }
)
_TO_FLOAT: dict[object, int] = {qlinear_float: 4, qconv_float: 6, qconv_transpose_float: 6}
"""Products that dequantize, with the place of their addend."""
_WHY: dict[str, str] = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "scaled_dot_product_attention", "fxq.qattention", "fxq.qattention_float"),
        "it takes exponentials and divides by what each row adds up to",
    ),
    **dict.fromkeys(
        ("layer_norm", "rms_norm", "group_norm", "instance_norm", "fxq.norm", "fxq.norm_quantize"),
        "it divides by the root of what each row adds up to",
    ),
    "fxq.qavg_pool": "its divisor is not in 1..2**23",
    "fxq.quantize": "an output of the model reads the same value in float32",
    **dict.fromkeys(
        ("fxq.qlinear_float", "fxq.qconv_float", "fxq.qconv_transpose_float"),
        "its bias does not fit int32 in steps of s_x * s_w",
    ),
}
"""Why there is no form of an operation whose multipliers are known ahead of time."""
_NO_ARITHMETIC = MOVES | MAX_POOLS | SPLITS | CAT | {GETITEM, CLAMP, RELU}


@dataclass(frozen=True)
class UseFixedPoint:
    """See the module's docstring."""

    name: str = "use-fixed-point"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.ONE_STEP

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """One rewrite for each float requantization; none under `requant="float"`."""
        if ctx.recipe.requant == "float":
            return 0
        count = 0
        for node in list(gm.graph.nodes):
            if node.target in _PRODUCTS:
                _fix_product(gm, node, ctx.recipe.rounding)
            elif node.target in _POOLS:
                if not _fix_pool(gm, node, ctx.recipe.rounding):
                    continue
            elif node.target is requantize:
                _fix_requantize(gm, node, ctx.recipe.rounding)
            elif node.target is qadd:
                _fix_add(gm, node)
            elif node.target is qmul:
                _fix_mul(gm, node, ctx.recipe.rounding)
            elif node.target is qupsample_bilinear:
                _fix_upsample(gm, node)
            else:
                continue
            count += 1
        known = set(ctx.report.float_steps)
        ctx.report.float_steps += [step for step in _float_steps(gm) if step not in known]
        return count


def _scale(node: object) -> float:
    assert isinstance(node, Node)
    scale: float = node.meta["qparams"][0]
    return scale


def _fix_product(gm: GraphModule, node: Node, rounding: RequantRounding) -> None:
    x, weight, bias, multiplier, *rest = node.args
    assert isinstance(multiplier, Node)
    scales = _scale(x), node.meta["weight_scales"], _scale(node)
    known = constant(gm, multiplier)
    assert np.array_equal(known.numpy(), numerics.requantize_multiplier(*scales)), f"{node}: its scales are others"
    stem = str(multiplier.target)
    with gm.graph.inserting_before(node):
        fixed = [
            get_attr(gm, set_constant(gm, f"{stem}_{name}", torch.from_numpy(array)), multiplier)
            for name, array in zip(
                ("q31", "shift"), numerics.fixed_multiplier(numerics.real_multiplier(*scales)), strict=True
            )
        ]
    fixed_op = _PRODUCTS[node.target]
    replace(gm, node, fixed_op, (x, weight, bias, *fixed, *rest, rounding), node.meta["qparams"])


def _fix_pool(gm: GraphModule, node: Node, rounding: RequantRounding) -> bool:
    """Not where a divisor of the user's own is none of an integer mean: that stays float, and the report names it."""
    x, *windows, z_x, _, zero_point, low, high = node.args
    if node.target is qavg_pool and windows[-1] is not None and not 1 <= windows[-1] <= MOST_COUNTED:  # type: ignore
        return False
    multiplier, shift = numerics.fixed_multiplier(np.float64(_scale(x)) / _scale(node))
    args = (x, *windows, z_x, int(multiplier), int(shift), zero_point, low, high, rounding)
    replace(gm, node, _POOLS[node.target], args, node.meta["qparams"])
    return True


def _fix_requantize(gm: GraphModule, node: Node, rounding: RequantRounding) -> None:
    q, z_x, _, *bounds = node.args
    multiplier, shift = numerics.fixed_multiplier(np.float64(_scale(q)) / _scale(node))
    args = (q, z_x, int(multiplier), int(shift), *bounds, rounding)
    replace(gm, node, requantize_fixed, args, node.meta["qparams"])


def _fix_add(gm: GraphModule, node: Node) -> None:
    a, b, _, z_a, _, z_b, *bounds = node.args
    (m_a, m_b), shift = numerics.fixed_multipliers(np.array([_scale(a), _scale(b)]) / _scale(node))
    args = (a, b, int(m_a), z_a, int(m_b), z_b, shift, *bounds)
    replace(gm, node, qadd_fixed, args, node.meta["qparams"])


def _fix_mul(gm: GraphModule, node: Node, rounding: RequantRounding) -> None:
    a, b, _, z_a, z_b, *bounds = node.args
    multiplier, shift = numerics.fixed_multiplier(np.float64(_scale(a)) * _scale(b) / _scale(node))
    args = (a, b, z_a, z_b, int(multiplier), int(shift), *bounds, rounding)
    replace(gm, node, qmul_fixed, args, node.meta["qparams"])


def _fix_upsample(gm: GraphModule, node: Node) -> None:
    x, size, factors, align_corners = node.args
    assert isinstance(factors, tuple | list)
    steps = tuple(numerics.fixed_step(factor) for factor in factors)  # type: ignore[arg-type]
    replace(gm, node, qupsample_bilinear_fixed, (x, size, steps, align_corners), node.meta["qparams"])


def _float_steps(gm: GraphModule) -> list[str]:
    """Where the graph computes on real numbers between its edges, as `module  operation: reason`."""
    steps = []
    for node in gm.graph.nodes:
        if is_call(node) and _is_float_arithmetic(node):
            name = _name(gm, node)
            why = f": {_WHY[name]}" if name in _WHY else ""
            steps.append(f"{module_of(node) or place_of(node)}  {name}{why}")
    return steps


def _is_float_arithmetic(node: Node) -> bool:
    if is_integer_op(node) and str(node.target).startswith("fxq.") and not _is_conversion(node):
        return node.target not in _INTEGER_ONLY
    own = _tensors(node)
    operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if not own or not any(value.dtype.is_floating_point for n in (node, *operands) for value in _tensors(n)):
        return False
    if node.target in (quantize, quantize_scaled):
        return is_integer_op(_origin(node))  # behind an input it is the edge, behind an island the island speaks for it
    if node.target in _TO_FLOAT:
        return any(isinstance(operand, Node) for operand in node.args[_TO_FLOAT[node.target] :])  # a bias beyond int32
    return node.target is not dequantize and node.target not in _NO_ARITHMETIC


def _is_conversion(node: Node) -> bool:
    return node.target in (quantize, quantize_scaled, dequantize) or node.target in _TO_FLOAT


def _origin(node: Node) -> Node:
    """What computed the numbers that a conversion reads, through moves and comparisons."""
    source = node.all_input_nodes[0]
    while source.op == "call_function" and source.target in _NO_ARITHMETIC:
        source = source.all_input_nodes[0]
    return source


def _tensors(node: Node) -> list[Value]:
    return [v for v in torch.utils._pytree.tree_leaves(node.meta.get("value")) if isinstance(v, Value)]


def _name(gm: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    return target_name(node.target)


PASS = UseFixedPoint()

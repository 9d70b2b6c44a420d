"""pool: averages and maxima over windows of a channels-last tensor.

    acc = sum over the window of q_x - z_x, what is padded adding nothing                                   exact int32
    qavg_pool            q_y = clamp(rne(f32(f32(acc) * f32(m / count))) + z_y, low, high), m = s_x / s_y      -> uint8
    qadaptive_avg_pool   the same over windows floor(i * size / output) to ceil((i + 1) * size / output)       -> uint8
    qavg_pool_fixed, qadaptive_avg_pool_fixed   q_y = clamp(scale(acc, multiplier / count, shift) + z_y, low, high)
    qmax_pool            q_y = the largest q_x of the window; what is padded holds 0                           -> uint8

x: uint8 [B, C, *spatial]; padding: one number per spatial dimension; count: the values of the window inside the input,
or inside the padding with `count_include_pad`. The fixed ones compute without a float (`fxq.ops.fixed_point` has scale;
a `divisor_override` lies in 1..2**23). Maxima keep the scale and zero point of x. Results are channels-last in
memory. NumPy truth: the functions of the same names in `fxq.numerics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.clamps import clamp_of
from fxq.decisions import Reason
from fxq.family import Claim, Family, Refusal
from fxq.graph import call, is_float_tensor, replace
from fxq.layout import empty, from_numpy
from fxq.pattern import Any as Operand
from fxq.pattern import Match, Miss, OneOf, Op
from fxq.qdq import dequantize, expect_dtype, expect_fixed, integer_bounds, quantize
from fxq.spelling import ADAPTIVE_AVG_POOLS, AVG_POOLS, MAX_POOLS, MEAN, float_bounds

Ints = Sequence[int]

MOST_COUNTED = 2**23
"""The largest divisor of an average in fixed point."""


def _portable(name: str) -> Any:
    """NumPy itself: sums and maxima of integers have one value only."""
    function = getattr(numerics, name)

    def run(x: Tensor, *args: Any) -> Tensor:
        expect_dtype(name, "x", x, torch.uint8)
        if x.dim() != 2 + len(args[0]):
            raise ValueError(f"fxq::{name}: x has shape {list(x.shape)}, expected [B, C] and {len(args[0])} sizes")
        return from_numpy(function(x.numpy(), *args))

    return run


def _portable_fixed(name: str, multiplier_at: int) -> Any:
    """The same of an op whose arguments end in multiplier, shift, zero_point, low, high and rounding."""
    average = _portable(name)

    def run(x: Tensor, *args: Any) -> Tensor:
        multiplier, shift, *_, rounding = (*args[multiplier_at:], "single")[:6]
        expect_fixed(name, rounding, multiplier, shift, shift)
        divisor = args[5] if name == "qavg_pool_fixed" else None
        if divisor is not None and not 1 <= divisor <= MOST_COUNTED:
            raise ValueError(f"fxq::{name}: divisor_override = {divisor}, expected 1..{MOST_COUNTED}")
        return average(x, *args)  # type: ignore[no-any-return]

    return run


def _fake_avg_pool(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, *rest: Any) -> Tensor:
    ones = [1] * len(kernel)
    return empty(x, x.shape[1], numerics.pool_sizes(x.shape[2:], kernel, stride, padding, ones, ceil_mode), x.dtype)


qavg_pool = kernels.define(
    "qavg_pool(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override, int z_x, float multiplier, int zero_point, int low, int high) -> Tensor",
    _portable("qavg_pool"),
    _fake_avg_pool,
)
qadaptive_avg_pool = kernels.define(
    "qadaptive_avg_pool(Tensor x, int[] output_size, int z_x, float multiplier, int zero_point, int low, int high) "
    "-> Tensor",
    _portable("qadaptive_avg_pool"),
    lambda x, output_size, *rest: empty(x, x.shape[1], output_size, x.dtype),
)
qavg_pool_fixed = kernels.define(
    "qavg_pool_fixed(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override, int z_x, int multiplier, int shift, int zero_point, int low, int high, "
    'str rounding="single") -> Tensor',
    _portable_fixed("qavg_pool_fixed", 7),
    _fake_avg_pool,
)
qadaptive_avg_pool_fixed = kernels.define(
    "qadaptive_avg_pool_fixed(Tensor x, int[] output_size, int z_x, int multiplier, int shift, int zero_point, "
    'int low, int high, str rounding="single") -> Tensor',
    _portable_fixed("qadaptive_avg_pool_fixed", 2),
    lambda x, output_size, *rest: empty(x, x.shape[1], output_size, x.dtype),
)
qmax_pool = kernels.define(
    "qmax_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    _portable("qmax_pool"),
    lambda x, kernel, stride, padding, dilation, ceil_mode: empty(
        x, x.shape[1], numerics.pool_sizes(x.shape[2:], kernel, stride, padding, dilation, ceil_mode), x.dtype
    ),
)

_SOURCE = Op({dequantize}, Operand("x"), Operand("s_x"), Operand("z_x"), shared=True)
_WINDOWS = tuple(map(Operand, ("kernel", "stride", "padding", "ceil_mode", "count_include_pad")))
_POOL = OneOf(
    Op(AVG_POOLS, _SOURCE, *_WINDOWS, name="pool"),
    Op(AVG_POOLS, _SOURCE, *_WINDOWS, Operand("divisor"), name="pool"),
    Op(ADAPTIVE_AVG_POOLS, _SOURCE, Operand("sizes"), name="pool"),
    Op({MEAN}, _SOURCE, Operand("dims"), Operand("keepdim"), name="pool"),
)
_LOWERED = Op({quantize}, OneOf(_POOL, clamp_of(_POOL)), Operand("s_y"), Operand("z_y"))


@dataclass(frozen=True)
class Pool(Family):
    """Averages over windows, and the mean over all spatial dimensions, of a float32 [B, C, *spatial].

    Maxima are carried by `fxq.ops.carry`, and lowered here.
    """

    name: str = "pool"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """An average with a scale of its own: averages are smaller than what they are of."""
        if node.op != "call_function" or node.target not in AVG_POOLS | ADAPTIVE_AVG_POOLS | {MEAN}:
            return None
        x = node.args[0]
        if not isinstance(x, Node) or not is_float_tensor(x) or node.kwargs:
            return None
        rank = len(x.meta["value"].shape)
        if node.target is MEAN:
            if rank not in (3, 4, 5) or node.args[1:2] != (tuple(range(2, rank)),):
                return Refusal(Reason.NO_INTEGER_OP, "a mean over other than all spatial dimensions")
            return Claim("pointwise", (x,))
        if rank != len(node.args[1]) + 2:  # type: ignore[arg-type]
            return Refusal(Reason.NO_INTEGER_OP, "its input has no batch dimension")
        if not all(isinstance(size, int) for sizes in node.args[1:4] if isinstance(sizes, tuple) for size in sizes):
            return Refusal(Reason.NO_INTEGER_OP, "its window is computed at run time")
        return Claim("pointwise", (x,))

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize([clamp](pool(dequantize(x)))) -> qavg_pool, qadaptive_avg_pool; max_pool of uint8 -> qmax_pool."""
        if node.target in MAX_POOLS and "qparams" in node.meta:
            return _lower_max_pool(gm, node)
        match = _LOWERED.match(node)
        if isinstance(match, Miss):
            return False
        _lower(gm, match)
        return True


def _lower(gm: GraphModule, match: Match) -> None:
    root, pool, qparams = match.root, match.node("pool"), (match["s_y"], match["z_y"])
    bounds = float_bounds(match.bound.get("clamp")) or (None, None)
    rest = (match["z_x"], match["s_x"] / qparams[0], qparams[1], *integer_bounds(bounds, *qparams))
    x = match["x"]
    if pool.target in AVG_POOLS:
        windows = (*pool.args[1:6], match.bound.get("divisor"))
        replace(gm, root, qavg_pool, (x, *windows, *rest), qparams)
    elif pool.target in ADAPTIVE_AVG_POOLS:
        replace(gm, root, qadaptive_avg_pool, (x, match["sizes"], *rest), qparams)
    else:
        ones = (1,) * len(match["dims"])
        if match["keepdim"]:
            replace(gm, root, qadaptive_avg_pool, (x, ones, *rest), qparams)
            return
        with gm.graph.inserting_before(root):
            pooled = call(gm, qadaptive_avg_pool, (x, ones, *rest), root, qparams)
        replace(gm, root, torch.flatten, (pooled, 1, -1), qparams)


def _lower_max_pool(gm: GraphModule, node: Node) -> bool:
    """`fold_qdq` has carried the integers here; without a batch dimension torch's op stays, which takes it or not."""
    x, *windows, ceil_mode = node.args
    assert isinstance(x, Node)
    sizes = tuple(size if isinstance(size, tuple) else (size,) for size in windows)
    if len(x.meta["value"].shape) != len(sizes[0]) + 2:
        return False
    replace(gm, node, qmax_pool, (x, *sizes, ceil_mode), node.meta["qparams"])
    return True


FAMILY = Pool()

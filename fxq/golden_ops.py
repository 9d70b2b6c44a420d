"""What each op of a golden model computes, in NumPy: the rows of `OPS`, `ELEMENTWISE` and `NUMBERS`.

What is not there has no place here: softmax, means and float products round in an order of their own in every library,
and torch's square root is off by a unit for one float in six. One bit is left open: where 0.0 meets -0.0 in a maximum,
torch's sign depends on the position in memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fxq import golden_images, golden_moves, numerics
from fxq.errors import GoldenError, GuardError
from fxq.numerics import F32, I8, I32, U8, Array


@dataclass(frozen=True)
class Op:
    """How a step computes, and what a trace shows of it.

    run: from the step's operands to its value; parts: from the same operands to what lies inside, by name; result: the
    name of the value beside its parts; weight: from the same operands to the weight as it was before it was packed.
    """

    run: Callable[..., Any]
    parts: Callable[..., dict[str, Array]] | None = None
    result: str = ""
    weight: Callable[..., I8] | None = None


# The integer ops. The order of their operands is that of the torch ops, whose weights are packed.


def _quantize_scaled(x: F32, factor: F32, scale: float, zero_point: int) -> U8:
    return numerics.quantize(x * factor, scale, zero_point)


def _weight(x: Array, packed: I8, bias: Array) -> I8:
    n, k = len(bias), x.shape[-1]
    if len(packed) != numerics.packed_size(n, k):
        raise ValueError(f"its input has {k} features, which is not what its weight takes")
    return numerics.unpack(packed, n, k)


def _qlinear(x: U8, weight: I8, bias: I32, multiplier: F32, zero_point: int, low: int, high: int) -> U8:
    return numerics.qlinear(x, _weight(x, weight, bias), bias, multiplier, zero_point, low, high)


def _qlinear_float(x: U8, weight: I8, bias: I32, multiplier: F32, addend: F32 | None = None) -> F32:
    return numerics.qlinear_float(x, _weight(x, weight, bias), bias, multiplier, addend)


def _qlinear_act(x: U8, weight: I8, bias: I32, multiplier: F32, activation: str, addend: F32 | None = None) -> F32:
    return numerics.qlinear_act(x, _weight(x, weight, bias), bias, multiplier, activation, addend)


def _qlinear_act_quantize(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: F32,
    activation: str,
    scale: float,
    zero_point: int,
    factor: F32 | None = None,
) -> U8:
    w = _weight(x, weight, bias)
    return numerics.qlinear_act_quantize(x, w, bias, multiplier, activation, scale, zero_point, factor)


def _qlinear_fixed(
    x: U8,
    weight: I8,
    bias: I32,
    multiplier: I32,
    shift: I32,
    zero_point: int,
    low: int,
    high: int,
    rounding: str = "single",
    zero_w: I32 | None = None,
) -> U8:
    operands = bias, multiplier, shift, zero_point, low, high, rounding, zero_w
    return numerics.qlinear_fixed(x, _weight(x, weight, bias), *operands)


def _qlinear_dynamic(x: F32, weight: I8, column_sums: I32, scale: F32, *rest: Any, **named: Any) -> F32:
    return numerics.qlinear_dynamic(x, _weight(x, weight, column_sums), scale, *rest, **named)


def _qlinear_dynamic_engine(x: F32, weight: I8, column_sums: I32, scale: F32, *rest: Any) -> F32:
    return numerics.qlinear_dynamic_engine(x, _weight(x, weight, column_sums), scale, *rest)


def _engine_parts(
    x: F32, weight: I8, column_sums: I32, scale: F32, bias: F32 | None, engine: str, steps: int
) -> dict[str, Array]:
    q, s_x, z_x = numerics.quantize_engine(x, engine, steps)
    acc = numerics.accumulate(q, _weight(x, weight, column_sums))
    return {"x_q": q, "scale": np.array(s_x), "zero_point": np.array(z_x), "acc": acc}


def _dynamic_parts(x: F32, weight: I8, column_sums: I32, *rest: object, **named: object) -> dict[str, Array]:
    q, scale, zero_point = numerics.quantize_rows(x)
    acc = numerics.accumulate(q, _weight(x, weight, column_sums))
    return {"x_q": q, "scale": scale, "zero_point": zero_point, "acc": acc}


def _linear_weight_only(x: F32, weight: I8, scale: F32, bias: F32 | None = None, dtype: object = None) -> F32:
    if x.dtype != np.float32:
        raise GoldenError(f"fxq.linear_weight_only of {x.dtype}: a golden model computes in float32 alone")
    return numerics.linear_weight_only(x, numerics.unpack(weight, len(scale), x.shape[-1]), scale, bias)


def _linear_parts(x: U8, weight: I8, bias: I32, *rest: object, **named: object) -> dict[str, Array]:
    acc = numerics.accumulate(x, _weight(x, weight, bias))
    return {"x_q": x, "acc": acc, "acc+bias": acc + bias}


def _act_parts(
    x: U8, weight: I8, bias: I32, multiplier: F32, activation: str, *rest: object, **named: object
) -> dict[str, Array]:
    act = _qlinear_act(x, weight, bias, multiplier, activation)
    return {**_linear_parts(x, weight, bias), "act": act}


def _attention_parts(
    q: U8,
    k: U8,
    v: U8,
    mask: Any,
    is_causal: bool,
    scale: float | None,
    z_q: int,
    z_v: int,
    s_qk: float,
    *rest: Any,
    before_heads: int,
) -> dict[str, Array]:
    q, k, _ = numerics.split_heads(q, k, v, rest[before_heads] if len(rest) > before_heads else 0)
    scores = numerics.attention_scores(q, k, mask, is_causal, scale, z_q, s_qk)
    return {"scores": scores, "weights": numerics.softmax_weights(scores)}


def _linear_weight(x: Array, weight: I8, bias: Array, *rest: object, **named: object) -> I8:
    return _weight(x, weight, bias)


# Pools and tables.


def _max_pool(
    input: Array,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool = False,
) -> Array:
    """The largest of each window over the last dimensions; the first of equals, and NaN above all, as in torch."""
    lowest = -np.inf if input.dtype.kind == "f" else np.iinfo(input.dtype.name).min
    return numerics.max_of_windows(input, kernel_size, stride, padding, dilation, ceil_mode, lowest, _larger)


def _max_pool1d(
    input: Array, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool = False
) -> Array:
    return _max_pool(input, (kernel_size,), (stride,), (padding,), (dilation,), ceil_mode)


def _embedding(
    input: npt.NDArray[np.integer],
    weight: Array,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Array:
    if max_norm is not None:
        raise GoldenError("an embedding with max_norm changes its weight at each call; a golden model does not")
    if input.size and (input.min() < 0 or input.max() >= len(weight)):
        raise IndexError(f"an index is outside the {len(weight)} rows of the embedding")
    rows: Array = weight[input]
    return rows


# What IEEE 754 defines to the last bit, and torch and NumPy both keep. Operands come in the dtype of the result.


def _larger(input: Any, other: Any) -> Array:
    """The larger of two; the first of equals (0.0 and -0.0 are equal), and NaN above all, as in torch."""
    larger: Array = np.where((other > input) | (other != other), other, input)
    return larger


def _smaller(input: Any, other: Any) -> Array:
    smaller: Array = np.where((other < input) | (other != other), other, input)
    return smaller


def _clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    above = input if min is None else np.where(input < min, min, input)
    return above if max is None else np.where(above > max, max, above)


def _divide(input: Any, other: Any) -> Any:
    # torch divides a number by a tensor in two roundings.
    return np.true_divide(input, other) if isinstance(input, np.ndarray) else np.reciprocal(other) * input


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`function` with torch's names for its operands; what takes more (alpha, rounding_mode) does not fit it."""
    return lambda input, other: function(input, other)


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda input: function(input)


# What a graph asks of a value besides its numbers.


class Name(str):
    """A dtype or device of torch, by name."""

    __repr__ = str.__str__


def _getattr(value: Any, name: str) -> Any:
    if not isinstance(value, np.ndarray):
        return getattr(value, name)
    match name:
        case "shape" | "ndim" | "T":
            return getattr(value, name)
        case "dtype":
            return Name(f"torch.{value.dtype}")
        case "device":
            return Name("cpu")
    raise ValueError(f"a golden model knows no attribute {name!r} of a tensor")


def _size(input: Array, dim: int | None = None) -> Any:
    return input.shape if dim is None else input.shape[dim]


def _structure(value: object) -> str:
    """`fxq.tracing.structure`, whose text a guard compares."""
    if value is None:
        return "None"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_structure(item)}" for key, item in value.items()) + "}"
    if is_dataclass(value) and not isinstance(value, type):
        items = (f"{field.name}={_structure(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({', '.join(items)})"
    if isinstance(value, list | tuple):
        inside = ", ".join(_structure(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return "*"


def _guard(value: object, expected: object, message: str) -> None:
    if value is expected or (not isinstance(value, np.ndarray) and value == expected):
        return
    described = f"a tensor {value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
    raise GuardError(f"{message}; this call has {described}; quantize again with examples like this call")


OPS: dict[str, Op] = {
    "fxq.quantize": Op(numerics.quantize),
    "fxq.quantize_scaled": Op(_quantize_scaled),
    "fxq.quantize_fused": Op(numerics.quantize_fused),
    "fxq.quantize_onednn": Op(numerics.quantize_onednn),
    "fxq.dequantize": Op(numerics.dequantize),
    "fxq.requantize": Op(numerics.requantize),
    "fxq.qadd": Op(numerics.qadd),
    "fxq.qadd_engine": Op(numerics.qadd_engine),
    "fxq.qlinear": Op(_qlinear, _linear_parts, "y_q", _linear_weight),
    "fxq.qlinear_float": Op(_qlinear_float, _linear_parts, "y", _linear_weight),
    "fxq.requantize_fixed": Op(numerics.requantize_fixed),
    "fxq.qadd_fixed": Op(numerics.qadd_fixed),
    "fxq.qlinear_fixed": Op(_qlinear_fixed, _linear_parts, "y_q", _linear_weight),
    "fxq.qlinear_act": Op(_qlinear_act, _linear_parts, "y", _linear_weight),
    "fxq.qlinear_act_quantize": Op(_qlinear_act_quantize, _act_parts, "y_q", _linear_weight),
    "fxq.qlinear_dynamic": Op(_qlinear_dynamic, _dynamic_parts, "y", _linear_weight),
    "fxq.qlinear_dynamic_engine": Op(_qlinear_dynamic_engine, _engine_parts, "y", _linear_weight),
    "fxq.linear_weight_only": Op(_linear_weight_only, weight=_linear_weight),
    "fxq.norm": Op(numerics.norm),
    "fxq.norm_quantize": Op(numerics.norm_quantize),
    "fxq.norm_and_quantize": Op(numerics.norm_and_quantize),
    "fxq.qattention": Op(numerics.qattention, partial(_attention_parts, before_heads=3), "y_q"),
    "fxq.qattention_float": Op(numerics.qattention_float, partial(_attention_parts, before_heads=2), "y"),
    "fxq.qmul": Op(numerics.qmul),
    "fxq.qmul_fixed": Op(numerics.qmul_fixed),
    "fxq.lookup": Op(numerics.lookup),
    "fxq.lookup_channels": Op(numerics.lookup_channels),
    "fxq.quantize_channels_last": Op(numerics.quantize),
    **{
        name: Op(conv, conv.parts, "y" if name.endswith("_float") else "y_q", conv.weight)
        for name, conv in golden_images.CONVOLUTIONS.items()
    },
    "fxq.qavg_pool": Op(numerics.qavg_pool),
    "fxq.qavg_pool_fixed": Op(numerics.qavg_pool_fixed),
    "fxq.qadaptive_avg_pool_fixed": Op(numerics.qadaptive_avg_pool_fixed),
    "fxq.qadaptive_avg_pool": Op(numerics.qadaptive_avg_pool),
    "fxq.qmax_pool": Op(numerics.qmax_pool),
    "fxq.qupsample_nearest": Op(numerics.qupsample_nearest),
    "fxq.qupsample_bilinear": Op(numerics.qupsample_bilinear),
    "fxq.qupsample_bilinear_fixed": Op(numerics.qupsample_bilinear_fixed),
    "fxq.qcat": Op(numerics.qcat),
    **{name: Op(move) for name, move in golden_moves.MOVES.items()},
    "max_pool1d": Op(_max_pool1d),
    "max_pool2d": Op(_max_pool),
    "max_pool3d": Op(_max_pool),
    "embedding": Op(_embedding),
    "fxq.qembedding": Op(numerics.qembedding),
    "fxq.qembedding_norm": Op(numerics.qembedding_norm),
    "clone": Op(lambda input: input),
    "getattr": Op(_getattr),
    "size": Op(_size),
    "dim": Op(lambda input: input.ndim),
    "numel": Op(lambda input: math.prod(input.shape if isinstance(input, np.ndarray) else input)),
    "guard": Op(_guard),
    "structure": Op(_structure),
}
"""The ops by name: those of fxq with their namespace, torch's functions and methods without."""

ELEMENTWISE: dict[str, Op] = {
    "add": Op(_binary(np.add)),
    "sub": Op(_binary(np.subtract)),
    "mul": Op(_binary(np.multiply)),
    "div": Op(_binary(_divide)),
    "truediv": Op(_binary(_divide)),
    "true_divide": Op(_binary(_divide)),
    "neg": Op(_unary(np.negative)),
    "abs": Op(_unary(np.abs)),
    "square": Op(_unary(np.square)),
    "float": Op(_unary(np.asarray)),
    "maximum": Op(_binary(_larger)),
    "minimum": Op(_binary(_smaller)),
    "clamp": Op(_clamp),
    "relu": Op(_unary(lambda x: np.where(x < 0, x.dtype.type(0), x))),
}
"""The ops whose operands torch brings to the dtype of the result first."""

NUMBERS: dict[str, Op] = {
    **{
        f"operator.{name}": Op(getattr(operator, name))
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "getitem"),
            *("and_", "or_", "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge"),
        )
    },
    **{f"math.{name}": Op(getattr(math, name)) for name in ("floor", "ceil", "trunc")},
    "power": Op(operator.pow),
    "whole": Op(int),
    "rounded": Op(round),
    "length": Op(len),
}
"""Python's arithmetic on sizes and other numbers."""

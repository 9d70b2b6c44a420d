"""The golden model: a quantized model as a NumPy program, with the same bits and every intermediate integer in sight.

    g = fxq.golden(qmodel);  g(x);  g.trace(x)["fc1.acc"];  g.save("model.npz")

Imports no torch: a saved program runs where torch is not installed. A step is one call of the graph; its op is a row of
`OPS`, `ELEMENTWISE` or `NUMBERS`, or of the caller's own table. What is not there has no place here: softmax, means and
float products round in an order of their own in every library, and torch's square root is off by a unit for one float
in six. One bit is left open: where 0.0 meets -0.0 in a maximum, torch's sign depends on the position in memory.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import operator
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fxq import numerics
from fxq.errors import FileError, GoldenError, GuardError, InputError
from fxq.numerics import F32, I8, I32, U8, Array

FORMAT, VERSION = "fxq-golden", 1


@dataclass(frozen=True)
class Op:
    """How a step computes, and what a trace shows of it.

    run: from the step's operands to its value; parts: from the same operands to what lies inside, by name; result: the
    name of the value beside its parts.
    """

    run: Callable[..., Any]
    parts: Callable[..., dict[str, Array]] | None = None
    result: str = ""


# The integer ops. The order of their operands is that of the torch ops, whose weights are packed.


def _quantize_scaled(x: F32, factor: F32, scale: float, zero_point: int) -> U8:
    return numerics.quantize(x * factor, scale, zero_point)


def _weight(x: Array, packed: I8, bias: I32) -> I8:
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
    x: U8, weight: I8, bias: I32, multiplier: F32, activation: str, scale: float, zero_point: int
) -> U8:
    w = _weight(x, weight, bias)
    return numerics.qlinear_act_quantize(x, w, bias, multiplier, activation, scale, zero_point)


def _linear_parts(x: U8, weight: I8, bias: I32, *rest: object, **named: object) -> dict[str, Array]:
    acc = numerics.accumulate(x, _weight(x, weight, bias))
    return {"x_q": x, "acc": acc, "acc+bias": acc + bias}


# Moves: the same numbers in another order or shape, as torch understands the arguments.


def _sizes(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


def _flatten(input: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    shape = input.shape or (1,)
    start, end = start_dim % len(shape), end_dim % len(shape)
    return input.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def _unflatten(input: Array, dim: int, sizes: tuple[int, ...]) -> Array:
    dim %= input.ndim
    known = math.prod(size for size in sizes if size != -1)
    whole = (input.shape[dim] // known if size == -1 else size for size in sizes)
    return input.reshape(*input.shape[:dim], *whole, *input.shape[dim + 1 :])


def _squeeze(input: Array, dim: int | tuple[int, ...] | None = None) -> Array:
    dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    ones = tuple(d % input.ndim for d in dims if input.ndim and input.shape[d] == 1)
    return np.squeeze(input, ones)


def _permute(input: Array, *dims: Any) -> Array:
    return np.transpose(input, _sizes(dims))


def _narrow(input: Array, dim: int, start: int, length: int) -> Array:
    start += input.shape[dim] if start < 0 else 0
    if start + length > input.shape[dim]:
        raise IndexError(f"narrow({dim}, {start}, {length}) reaches beyond the size {input.shape[dim]}")
    return _slice(input, dim, start, start + length)


def _slice(x: Array, dim: int, start: int, stop: int) -> Array:
    index: list[slice] = [slice(None)] * x.ndim
    index[dim] = slice(start, stop)
    return x[tuple(index)]


def _split(tensor: Array, split_size_or_sections: int | tuple[int, ...], dim: int = 0) -> tuple[Array, ...]:
    total, sections = tensor.shape[dim], split_size_or_sections
    if isinstance(sections, int):
        sections = tuple(min(sections, total - start) for start in range(0, total, sections)) or (0,)
    if sum(sections) != total:
        raise ValueError(f"split sizes {list(sections)} do not add up to the size {total}")
    stops = itertools.accumulate(sections)
    return tuple(_slice(tensor, dim, stop - size, stop) for size, stop in zip(sections, stops, strict=True))


def _chunk(input: Array, chunks: int, dim: int = 0) -> tuple[Array, ...]:
    return _split(input, max(1, -(-input.shape[dim] // chunks)), dim)


def _tensor_split(input: Array, indices_or_sections: int | tuple[int, ...], dim: int = 0) -> tuple[Array, ...]:
    return tuple(np.array_split(input, indices_or_sections, dim))


def _unbind(input: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(np.moveaxis(input, dim, 0))


def _expand(input: Array, *size: Any) -> Array:
    size = _sizes(size)
    known = (1,) * (len(size) - input.ndim) + input.shape
    return np.broadcast_to(input, tuple(k if s == -1 else s for s, k in zip(size, known, strict=True)))


def _pixel_shuffle(input: Array, upscale_factor: int) -> Array:
    *lead, c, h, w = input.shape
    r, n = upscale_factor, len(lead)
    blocks = input.reshape(*lead, c // (r * r), r, r, h, w)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return blocks.transpose(order).reshape(*lead, c // (r * r), h * r, w * r)


def _pixel_unshuffle(input: Array, downscale_factor: int) -> Array:
    *lead, c, h, w = input.shape
    r, n = downscale_factor, len(lead)
    blocks = input.reshape(*lead, c, h // r, r, w // r, r)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return blocks.transpose(order).reshape(*lead, c * r * r, h // r, w // r)


def _max_pool(
    input: Array,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool = False,
) -> Array:
    """The largest of each window over the last dimensions; the first of equals, and NaN above all, as in torch."""
    rank = len(kernel_size)
    lowest: Any = -np.inf if input.dtype.kind == "f" else np.iinfo(input.dtype.name).min
    counts, pads = [], [(0, 0)] * (input.ndim - rank)
    for size, k, s, p, d in zip(input.shape[-rank:], kernel_size, stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1  # a window may not begin in the padding on the right
        if count < 1:
            raise ValueError(f"its input of size {size} is smaller than the pooling window")
        counts.append(count)
        pads.append((p, max(p, (count - 1) * s + d * (k - 1) + 1 - size - p)))
    padded: Any = np.pad(input, pads, constant_values=lowest)
    best: Array = np.full((*input.shape[:-rank], *counts), lowest, input.dtype)
    for offset in itertools.product(*(range(k) for k in kernel_size)):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        window = tuple(slice(b, b + s * (n - 1) + 1, s) for b, s, n in zip(starts, stride, counts, strict=True))
        best = _larger(best, padded[(..., *window)])
    return best


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


class _Name(str):
    """A dtype or device of torch, by name."""

    __repr__ = str.__str__


def _getattr(value: Any, name: str) -> Any:
    if not isinstance(value, np.ndarray):
        return getattr(value, name)
    match name:
        case "shape" | "ndim" | "T":
            return getattr(value, name)
        case "dtype":
            return _Name(f"torch.{value.dtype}")
        case "device":
            return _Name("cpu")
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
    "fxq.dequantize": Op(numerics.dequantize),
    "fxq.requantize": Op(numerics.requantize),
    "fxq.qadd": Op(numerics.qadd),
    "fxq.qlinear": Op(_qlinear, _linear_parts, "y_q"),
    "fxq.qlinear_float": Op(_qlinear_float, _linear_parts, "y"),
    "fxq.qlinear_act": Op(_qlinear_act, _linear_parts, "y"),
    "fxq.qlinear_act_quantize": Op(_qlinear_act_quantize, _linear_parts, "y_q"),
    "reshape": Op(lambda input, shape: np.reshape(input, shape)),
    "flatten": Op(_flatten),
    "unflatten": Op(_unflatten),
    "squeeze": Op(_squeeze),
    "unsqueeze": Op(lambda input, dim: np.expand_dims(input, dim)),
    "transpose": Op(lambda input, dim0, dim1: np.swapaxes(input, dim0, dim1)),
    "permute": Op(_permute),
    "movedim": Op(lambda input, source, destination: np.moveaxis(input, source, destination)),
    "narrow": Op(_narrow),
    "select": Op(lambda input, dim, index: np.take(input, index, dim)),
    "flip": Op(lambda input, *dims: np.flip(input, _sizes(dims))),
    "tile": Op(lambda input, *dims: np.tile(input, _sizes(dims))),
    "expand": Op(_expand),
    "pixel_shuffle": Op(_pixel_shuffle),
    "pixel_unshuffle": Op(_pixel_unshuffle),
    "cat": Op(lambda tensors, dim=0: np.concatenate(tensors, dim)),
    "stack": Op(lambda tensors, dim=0: np.stack(tensors, dim)),
    "split": Op(_split),
    "chunk": Op(_chunk),
    "tensor_split": Op(_tensor_split),
    "unbind": Op(_unbind),
    "getitem": Op(operator.getitem),
    "max_pool1d": Op(_max_pool1d),
    "max_pool2d": Op(_max_pool),
    "max_pool3d": Op(_max_pool),
    "embedding": Op(_embedding),
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
    "whole": Op(int),
    "rounded": Op(round),
    "length": Op(len),
}
"""Python's arithmetic on sizes and other numbers."""


def canonical(target: str, *, on_tensors: bool) -> str:
    """The name in the tables of a target as `fxq.quantized.encode` writes it; "" for what can have no row.

    on_tensors: whether a tensor goes in or comes out, so that `operator.add` is torch's.
    """
    if target.startswith("op:"):
        return target.removeprefix("op:").removesuffix(".default")
    home, _, name = target.rpartition(".")
    if home in ("operator", "_operator", "math") and not on_tensors:
        return f"{home.lstrip('_')}.{name}"
    return name if home.partition(".")[0] in ("", "builtins", "torch", "operator", "_operator", "fxq") else ""


@dataclass(frozen=True)
class Input:
    """A parameter of the model. dtype: of the tensor that the examples gave, "" where they gave something else."""

    name: str
    kind: int
    optional: bool
    default: Any
    dtype: str


@dataclass(frozen=True)
class Step:
    """One call: `name = op(*args, **kwargs)`, operands as plain data with tags (`_resolve`).

    op: "" where NumPy has none, and the value comes from torch. label: its name in a trace; line: the user's file:line.
    dtype: what elementwise operands are brought to.
    """

    name: str
    op: str
    args: Any
    kwargs: Any
    label: str
    line: str
    dtype: str = ""


@dataclass(frozen=True)
class Program:
    """A model as plain data; `constants` are the arrays that its tags name."""

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: Any
    constants: Mapping[str, Array]


Recorder = Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Any]]


class GoldenModel:
    """A quantized model in NumPy: called like it, with arrays for tensors; returns its bits in its structure."""

    def __init__(
        self,
        program: Program,
        *,
        ops: Mapping[str, Callable[..., Any]] | None = None,
        types: Mapping[str, type] | None = None,
        record: Recorder | None = None,
    ) -> None:
        """ops: rows of the caller's own; types: the user's classes that the model returns.

        record: what torch computes in the steps without an op, for one call. Raises `GoldenError` for such steps where
        there is no `record`.
        """
        own = {name: Op(run) for name, run in (ops or {}).items()}
        self.program = program
        self.types = types or {}
        self.record = record
        self.table = {**OPS, **ELEMENTWISE, **NUMBERS, **own}
        islands = [step for step in program.steps if not step.op]
        self.islands = tuple(step.label for step in islands)
        missing = sorted({step.op for step in program.steps if step.op and step.op not in (*self.table, "construct")})
        if missing:
            raise GoldenError(f"the golden model calls {', '.join(missing)}: pass each as ops={{name: function}}")
        if self.islands and record is None:
            lines = "\n".join(f"  {step.label}  {step.line}".rstrip() for step in islands)
            raise GoldenError(
                f"NumPy cannot promise torch's bits of these operations, {len(islands)} in all:\n{lines}\n"
                'take their values from torch, and all integers from NumPy, with fxq.golden(qmodel, islands="torch"), '
                "or quantize a part of the model without them"
            )
        kinds = [inspect._ParameterKind(i.kind) for i in program.inputs]
        self.signature = inspect.Signature(
            [
                inspect.Parameter(
                    i.name, kind, default=_resolve(i.default, {}) if i.optional else inspect.Parameter.empty
                )
                for i, kind in zip(program.inputs, kinds, strict=True)
            ]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, bit for bit; raises `InputError` and `GuardError` where the model raises."""
        return self._run(args, kwargs, None)

    def trace(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Every intermediate array of one call, by the user's module path.

        A linear `fc1` gives `fc1.x_q`, `fc1.acc`, `fc1.acc+bias` and `fc1.y_q` (uint8) or `fc1.y` (float32); any other
        operation `<module>.<op>`. The second call of a module is `fc1#2`, the second op of a name `block.qadd#2`.
        """
        traced: dict[str, Array] = {}
        self._run(args, kwargs, traced)
        return traced

    def save(self, path: str | Path) -> None:
        """Write the program to one .npz without pickles; raises `GoldenError` where it needs torch."""
        if self.islands:
            raise GoldenError(f"a golden model that takes values from torch cannot be saved: {', '.join(self.islands)}")
        plain = asdict(self.program)
        names = list(plain.pop("constants"))
        text = json.dumps({"format": FORMAT, "version": VERSION, "names": names, **plain})
        arrays = {f"constant{i}": self.program.constants[name] for i, name in enumerate(names)}
        with Path(path).open("wb") as file:
            np.savez(file, program=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, *, ops: Mapping[str, Callable[..., Any]] | None = None) -> GoldenModel:
        """Read what `save` wrote. The user's output classes become plain dicts and tuples.

        Raises `FileError` for a missing, damaged or foreign file, `GoldenError` for ops that only the writer had.
        """
        if not Path(path).is_file():
            raise FileError(f"{path}: no such file")
        try:
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                plain = json.loads(bytes(file["program"]))
                if plain["format"] != FORMAT:
                    raise FileError(f"{path} is not a golden model")
                if plain["version"] != VERSION:
                    raise FileError(f"{path} has format version {plain['version']}, this fxq reads {VERSION}")
                constants = {name: _frozen(file[f"constant{i}"]) for i, name in enumerate(plain["names"])}
            inputs, steps = (Input(**i) for i in plain["inputs"]), (Step(**s) for s in plain["steps"])
            program = Program(tuple(inputs), tuple(steps), plain["output"], constants)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} is damaged or not a golden model: {error}") from error
        return cls(program, ops=ops)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: dict[str, Array] | None) -> Any:
        env: dict[str, Any] = self._bind(args, kwargs)
        given = self.record(args, kwargs) if self.record is not None and self.islands else {}
        env.update((f"constant {name}", array) for name, array in self.program.constants.items())
        for step in self.program.steps:
            env[step.name] = value = self._step(step, env, traced) if step.op else given[step.name]
            if traced is not None and isinstance(value, np.ndarray):
                op = self.table.get(step.op)
                traced[f"{step.label}.{op.result}" if op is not None and op.result else step.label] = value
        return _resolve(self.program.output, env)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the call does not fit {self.signature}: {error}") from None
        bound.apply_defaults()
        for i in self.program.inputs:
            value = bound.arguments[i.name]
            if i.dtype and not isinstance(value, np.ndarray):
                raise InputError(f"`{i.name}` is a {type(value).__name__}; a golden model takes NumPy arrays")
            if i.dtype and value.dtype != i.dtype and "float" in i.dtype + str(value.dtype):
                raise InputError(f"`{i.name}` is {value.dtype}; convert it with .astype(np.{i.dtype})")
        return bound.arguments

    def _step(self, step: Step, env: dict[str, Any], traced: dict[str, Array] | None) -> Any:
        args, kwargs = _resolve(step.args, env), _resolve(step.kwargs, env)
        if step.op == "construct":
            name, *args = args
            plain = kwargs or (args[0] if len(args) == 1 and isinstance(args[0], dict) else tuple(args))
            return self.types[name](*args, **kwargs) if name in self.types else plain
        if step.dtype:
            args = [_as_dtype(value, step.dtype) for value in args]
            kwargs = {key: _as_dtype(value, step.dtype) for key, value in kwargs.items()}
        op = self.table[step.op]
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are values like others, in torch as well
                if traced is not None and op.parts is not None:
                    traced.update((f"{step.label}.{part}", array) for part, array in op.parts(*args, **kwargs).items())
                value = op.run(*args, **kwargs)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{step.label}: {error}") from error
        return np.asarray(value) if isinstance(value, np.generic) else value


def build(
    plain: Mapping[str, Any], constants: Mapping[str, Array], types: Iterable[str], ops: Iterable[str]
) -> Program:
    """The program of a graph written down by `fxq.quantized.encode`, its constants as arrays.

    types: targets that are classes; ops: names of ops that the caller brings. A step that has no op here gets "".
    """
    nodes = plain["nodes"]
    values = {entry["name"]: entry["value"] for entry in nodes}
    positional, keyword = plain["signature"]
    placeholders = [entry for entry in nodes if entry["op"] == "placeholder"]
    inputs = []
    for i, entry in enumerate(placeholders):
        kind: inspect._ParameterKind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if i < positional:
            kind = inspect.Parameter.POSITIONAL_ONLY
        elif i >= len(placeholders) - keyword:
            kind = inspect.Parameter.KEYWORD_ONLY
        default = _tagged(entry["args"][0]) if entry["args"] else None
        inputs.append(Input(entry["target"], int(kind), bool(entry["args"]), default, _dtype(entry["value"])))
    rename = {entry["name"]: entry["target"] for entry in placeholders}
    rename |= {entry["name"]: f"constant {entry['target']}" for entry in nodes if entry["op"] == "get_attr"}
    counts: Counter[str] = Counter()
    steps, output = [], None
    for entry in nodes:
        args, kwargs = _tagged(entry["args"], rename), _tagged(entry["kwargs"], rename)
        if entry["op"] == "output":
            output = _tagged(entry["args"][0], rename)
        elif entry["op"] == "call_function" and entry["target"] in types:
            args = {"$tuple": [entry["target"], *args["$tuple"]]}
            steps.append(Step(entry["name"], "construct", args, kwargs, entry["name"], ""))
        elif entry["op"].startswith("call"):
            op = _op_of(entry, values, ops)
            label, line = _label(entry, op, counts), (entry["origin"] or ("", ""))[1]
            dtype = _dtype(entry["value"]) if op in ELEMENTWISE and op not in ops else ""
            steps.append(Step(entry["name"], op, args, kwargs, label, line, dtype))
    needed = {name for step in steps if step.op for name in _references((step.args, step.kwargs))}
    needed.update(_references(output))
    kept = {name: _frozen(constants[name]) for name in constants if f"constant {name}" in needed}
    return Program(tuple(inputs), tuple(steps), output, kept)


def _op_of(entry: Mapping[str, Any], values: Mapping[str, Any], ops: Iterable[str]) -> str:
    """The name of the row that computes `entry`; "" where there is none that takes these operands."""
    if entry["op"] == "call_module":
        return ""
    operands = [values[name] for name in _references((entry["args"], entry["kwargs"]))]
    name = canonical(entry["target"], on_tensors=any("$value" in str(v) for v in (entry["value"], *operands)))
    if name in ops:
        return name
    op = OPS.get(name) or NUMBERS.get(name)
    if op is None and _dtype(entry["value"]):
        op = ELEMENTWISE.get(name)
    if op is None:
        return ""
    try:
        inspect.signature(op.run).bind(*entry["args"], **dict(entry["kwargs"].get("$dict", ())))
    except TypeError:
        return ""
    except ValueError:
        pass  # a builtin without a signature
    return name


def _label(entry: Mapping[str, Any], op: str, counts: Counter[str]) -> str:
    """Where a trace shows a step: `<module>` for a linear, else `<module>.<op>`, and `#2` for the second of a name."""
    module, _ = entry["origin"] or ("", "")
    if op in OPS and OPS[op].parts is not None:
        label = module or "linear"
    elif entry["op"] == "call_module":
        label = entry["target"]
    else:
        label = f"{module}.{_short(entry['target'])}".lstrip(".")
    if not _dtype(entry["value"]):
        return label  # a size or the like, which no trace shows
    counts[label] += 1
    return label if counts[label] == 1 else f"{label}#{counts[label]}"


def _short(target: str) -> str:
    return target.removesuffix(".default").rpartition(".")[2]


def _dtype(value: Any) -> str:
    """The dtype of an encoded tensor value, "" for any other value."""
    return value["$value"][0].removeprefix("torch.") if isinstance(value, dict) and "$value" in value else ""


def _tagged(value: Any, rename: Mapping[str, str] | None = None) -> Any:
    """Encoded arguments as JSON can hold them: tuples get a tag too, and dicts a list of pairs."""
    if isinstance(value, tuple | list):
        items = [_tagged(item, rename) for item in value]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "$node":
        return {tag: (rename or {}).get(content, content)}
    if tag == "$dict":
        return {tag: [[_tagged(key, rename), _tagged(item, rename)] for key, item in content]}
    return {tag: [_tagged(item, rename) for item in content] if isinstance(content, tuple | list) else content}


def _resolve(value: Any, env: Mapping[str, Any]) -> Any:
    """A tagged value with what its tags stand for."""
    if isinstance(value, list):
        return [_resolve(item, env) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "$node":
            return env[content]
        case "$tuple" | "$size":
            return tuple(_resolve(item, env) for item in content)
        case "$dict":
            return {_resolve(key, env): _resolve(item, env) for key, item in content}
        case "$slice":
            return slice(*(_resolve(item, env) for item in content))
        case "$ellipsis":
            return ...
        case "$torch":
            return _Name(f"torch.{content}")
        case "$device":
            return _Name(content)
    raise GoldenError(f"a golden model knows no {tag}")


def _references(value: Any) -> Iterator[str]:
    """The names that an encoded or tagged value refers to."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for tag, content in value.items():
            if tag == "$node":
                yield content
            else:
                yield from _references(content)


def _as_dtype(value: Any, dtype: str) -> Any:
    """`value` in `dtype` if it is an array or a number."""
    if isinstance(value, np.ndarray):
        return value.astype(dtype)
    return np.dtype(dtype).type(value) if isinstance(value, int | float) else value


def _frozen(array: Array) -> Array:
    """A copy that nobody can write to."""
    copied = np.array(array)
    copied.setflags(write=False)
    return copied

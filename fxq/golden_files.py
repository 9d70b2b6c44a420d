"""A golden model's numbers as files, for people who build hardware: `GoldenModel.dump` writes a folder with them.

    manifest.json   the layers in order: op, formula, operands by name, result; all arrays with type and shape
    arrays.npz      every array under its name
    golden.h        the same for C: one `static const` array each, a `#define` for each number
    hex/*.hex       the same for `$readmemh`: one element per line, two's complement or the bits of a float
    README.md       what stands here and how to recompute a layer: the equations of all ops in it

The same model and inputs give the same bytes. Imports no torch.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fxq import numerics
from fxq.errors import FileError
from fxq.numerics import Array

FORMAT, VERSION = "fxq-golden-files", 2
_C_TYPES = {"bool": "uint8_t", "float32": "float", "float64": "double"}
_PER_LINE = 16


@dataclass(frozen=True)
class Ref:
    """An operand or result that is the array of this name."""

    array: str


@dataclass(frozen=True)
class Layer:
    """One step of the model.

    name: as in a trace; op: "" where torch computed it; line: the user's file:line. operands: by parameter name, arrays
    as `Ref`s; inside: what lies between operands and result.
    """

    name: str
    op: str
    line: str
    operands: Mapping[str, Any]
    inside: Sequence[Any]
    result: Any


@dataclass
class Files:
    """The layers and arrays of one model and one call, as they come; `write` writes them down."""

    layers: list[Layer] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> Any:
        """Keep an array under `name`, or several as `name[0]`, ...; what stands for `value` in layers."""
        if isinstance(value, tuple | list):
            return [self.keep(f"{name}[{i}]", item) for i, item in enumerate(value)]
        if not isinstance(value, np.ndarray):
            return value
        unique, count = name, 1
        while unique in self.arrays:
            count += 1
            unique = f"{name}#{count}"
        self.arrays[unique] = value
        return Ref(unique)

    def write(self, path: Path, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Write the folder `path`, all of it or nothing. inputs, outputs: of the model, arrays as `Ref`s.

        Raises `FileError` where `path` is there and not an empty folder, or cannot be written.
        """
        _write(path, self.layers, self.arrays, inputs, outputs)


def _write(path: Path, layers: Sequence[Layer], arrays: Mapping[str, Array], inputs: Any, outputs: Any) -> None:
    _check(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        _fill(partial, layers, arrays, inputs, outputs)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise FileError(f"the folder {path} is not empty; give another, or remove it first")
    elif path.exists():
        raise FileError(f"{path} is a file; a dump is a folder")
    elif not path.parent.is_dir():
        raise FileError(f"there is no folder {path.parent} to write {path.name} into; create it first")


def _fill(folder: Path, layers: Sequence[Layer], arrays: Mapping[str, Array], inputs: Any, outputs: Any) -> None:
    names = _identifiers(arrays)
    layers = [replace(layer, operands=_operands(layer)) for layer in layers]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": _plain(inputs),
        "layers": [
            {
                "name": layer.name,
                "op": layer.op or "torch",
                "formula": formula(layer.op),
                "line": layer.line,
                "operands": {name: _plain(value) for name, value in layer.operands.items()},
                "inside": _plain(layer.inside),
                "result": _plain(layer.result),
            }
            for layer in layers
        ],
        "outputs": _plain(outputs),
        "arrays": {
            name: {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "c": f"fxq_{names[name]}",
                "hex": f"hex/{names[name]}.hex",
            }
            for name, array in arrays.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "README.md").write_text(README + "".join(_equations({layer.op for layer in layers})))
    with (folder / "arrays.npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    with (folder / "golden.h").open("w") as header:
        header.writelines(f"{line}\n" for line in _header(layers, arrays, names))
    (folder / "hex").mkdir()
    for name, array in arrays.items():
        with (folder / "hex" / f"{names[name]}.hex").open("w") as file_hex:
            file_hex.write(f"// {_title(name, array)}\n")
            file_hex.writelines(f"{word}\n" for word in _words(array))


def _operands(layer: Layer) -> dict[str, Any]:
    """The operands, a convolution's window by its fields in place of its text."""
    return {
        name: asdict(numerics.Window.parse(value)) if name == "window" else value
        for name, value in layer.operands.items()
    }


def formula(op: str) -> str:
    """The equation of an op of fxq's, from the docstring of its NumPy truth; "" where it has none."""
    return (getattr(_truth(op), "__doc__", "") or "").partition("\n")[0].strip()


def _truth(op: str) -> object:
    """What computes an op of fxq's in `fxq.numerics`; None where there is nothing of its name."""
    name = op.removeprefix("fxq.").removesuffix("_channels_last")  # the order in memory is no part of it
    return getattr(numerics, name, None) if op.startswith("fxq.") else None


def _equations(ops: Iterable[str]) -> Iterator[str]:
    """The docstrings of the ops' NumPy truth, of what those name, and of the modules they stand in; Markdown."""
    found: dict[str, Callable[..., Any]] = {}
    waiting = [_truth(op) for op in ops]
    while waiting:
        truth = waiting.pop()
        if isinstance(truth, dict):  # a choice by name, as `numerics.NORMS`
            waiting += truth.values()
        elif inspect.isfunction(truth) and truth.__name__ not in found:
            found[truth.__name__] = truth
            named = re.findall(r"`(\w+)`|(\w+)\(", truth.__doc__ or "")
            waiting += [getattr(numerics, name, None) for pair in named for name in pair if name]
    for module in sorted({function.__module__ for function in found.values()}):
        functions = [found[name] for name in sorted(found) if found[name].__module__ == module]
        yield f"\n### {module}\n\n```text\n{inspect.getdoc(sys.modules[module])}\n```\n"
        for function in functions:
            yield f"\n`{function.__name__}({', '.join(inspect.signature(function).parameters)})`\n"
            yield f"\n```text\n{inspect.getdoc(function)}\n```\n"


def _plain(value: Any) -> Any:
    """As JSON: an array by name, a float with its bits, what JSON has no word for as text."""
    if isinstance(value, Ref):
        return {"array": value.array}
    if isinstance(value, float):
        return {
            "value": repr(value),
            "float32": struct.pack(">f", value).hex(),
            "float64": struct.pack(">d", value).hex(),
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | str) else repr(value)


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """A name for each that file systems take, and C behind a prefix: `fc1.acc+bias` -> `fc1_acc_plus_bias`."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"\W", "_", name.replace("+", "_plus_"), flags=re.ASCII)[:200]
        unique, count = stem, 1
        while unique.lower() in taken:  # some file systems and all #defines know no case
            count += 1
            unique = f"{stem}_{count}"
        taken.add(unique.lower())
        found[name] = unique
    return found


def _title(name: str, array: Array) -> str:
    return f"{name}: {array.dtype} {list(array.shape)}, row major"


def _comment(text: str) -> str:
    """A comment of C: the name of a module may hold what begins or ends one."""
    return f"/* {text.replace('*/', '* /').replace('/*', '/ *')} */"


def _words(array: Array) -> Iterator[str]:
    """Each element as the hex digits of its bits."""
    flat = np.ascontiguousarray(array).ravel()
    digits = 2 * flat.itemsize
    return (f"{int(bits):0{digits}x}" for bits in flat.view(f"u{flat.itemsize}"))


def _header(layers: Sequence[Layer], arrays: Mapping[str, Array], names: Mapping[str, str]) -> Iterator[str]:
    yield from ("/* Written by fxq; README.md explains it. */", "#ifndef FXQ_GOLDEN_H", "#define FXQ_GOLDEN_H")
    yield from ("#include <math.h>", "#include <stdint.h>", "")
    numbers = [dict(_literals(layer.name, layer.operands)) for layer in layers]
    macros = _identifiers(chain.from_iterable(numbers))
    for layer, literals in zip(layers, numbers, strict=True):
        title = f"{layer.name}: {layer.op or 'torch'}  {formula(layer.op)}".rstrip()
        yield _comment(title)
        yield from (f"#define FXQ_{macros[name].upper()} {text}" for name, text in literals.items())
    yield ""
    for name, array in arrays.items():
        yield _comment(_title(name, array))
        if not array.size:
            continue  # C has no empty arrays
        kind = _C_TYPES.get(str(array.dtype), f"{array.dtype}_t")
        yield f"static const {kind} fxq_{names[name]}[{array.size}] = {{"
        write = _float32 if array.dtype == np.float32 else _number
        values = [write(value) for value in array.ravel().tolist()]
        for start in range(0, len(values), _PER_LINE):
            yield f"  {', '.join(values[start : start + _PER_LINE])},"
        yield "};"
    yield "#endif"


def _literals(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The numbers in `value` as C, by their names: one by its literal, a list as an initializer, a dict by its keys."""
    if isinstance(value, bool | int | float):
        yield name, _number(value)
    elif isinstance(value, list | tuple) and value and all(isinstance(item, bool | int | float) for item in value):
        yield name, f"{{{', '.join(map(_number, value))}}}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _literals(f"{name}.{key}", item)


def _float32(value: float) -> str:
    """A C literal of exactly this float32, which nine digits tell from all others. C++ before 17 has no hex floats."""
    return f"{value:.8e}f" if math.isfinite(value) else _number(value)


def _number(value: bool | int | float) -> str:
    """A C literal of exactly this value, in brackets where it has a sign."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NAN" if math.isnan(value) else "(-INFINITY)" if value < 0 else "INFINITY"
        text = repr(value)
    else:
        value = int(value)
        text = f"{value + 1} - 1" if value in (-(2**31), -(2**63)) else str(value)  # C has no negative literals
    return f"({text})" if text.startswith("-") else text


README = """# A golden model in files

Every constant of a quantized model, and every number that it computes for one set of inputs. Nothing here is rounded:
integers are themselves, floats have all the digits or bits that tell them from every other.

| file | what it holds |
|---|---|
| `manifest.json` | the layers in order, and a list of all arrays |
| `arrays.npz` | the arrays for NumPy: `np.load("arrays.npz")["fc1.weight"]` |
| `golden.h` | the arrays for C and C++, flat and row major, `fxq_fc1_weight`; numbers, `#define FXQ_FC1_ZERO_POINT 3` |
| `hex/` | the arrays for `$readmemh`, one element per line, row major |

## manifest.json

`layers`: in the order in which they run. Each has

- `name`: the module of the model, as in `GoldenModel.trace`; a second call of it is `fc1#2`
- `op`, `formula`: what it computes. `fxq.qlinear` is fxq's own, with all of its equations at the end of this page (an
  op's name may end in `_channels_last`, which is an order in memory and changes no number); `torch` is a float
  operation whose values torch gave; any other name, as `reshape`, is torch's function of that name, without a formula
- `line`: where the model's code calls it, "" where that is not known
- `operands`: what it reads, by name. `{"array": "fc1.weight"}` is an array; anything else is the value itself, floats
  with the bits of their float32 and float64 form: an equation that says `f32(m)` takes the first, one that divides or
  multiplies `m` before it rounds, as that of an average, the second
- `inside`: arrays on the way, such as the sums before requantization
- `result`: the array that it gives

`inputs` and `outputs` are those of the model, in its own structure of lists and dicts. `arrays` gives `dtype` and
`shape` of each array, its name in `golden.h` (`c`; an array without elements is not there) and its hex file (`hex`).
The numbers that a layer takes are macros there, below its name; lists of numbers are initializers, `{2, 2}`.

## Arrays of a product `fc1`

| array | type | shape of a linear; of a convolution | what it is |
|---|---|---|---|
| `fc1.x_q` | uint8 | [..., K]; [B, C, *spatial] | its input |
| `fc1.weight` | int8 | [N, K]; [N, C / groups, *kernel] | the weight; transposed: the output channels first, too |
| `fc1.bias` | int32 | [N] | the bias in steps of s_x * s_w, less z_x * sum of the weights of output n |
| | | transposed: [phases, N] | one row for each phase `o mod stride` of an output place o, row major |
| `fc1.multiplier` | int32 or float32 | [N] | what a sum is multiplied with |
| `fc1.shift` | int32 | [N] | requant "fixed" only: the right shift of the 64-bit product |
| `fc1.acc` | int32 | [..., N]; [B, N, *spatial] | sum of x_q * weight; outside of an image x_q is z_x |
| `fc1.acc+bias` | int32 | the same | the same plus the bias; transposed: this alone |
| `fc1.act` | float32 | the same | what an activation makes of `f32(acc+bias) * multiplier`, before it is quantized |
| `fc1.y_q`, `fc1.y` | uint8, float32 | the same | the result |

`window`, of a convolution: `kernel`, `stride`, `dilation` (and `output_padding`) have a number for each spatial
dimension, `padding` two, before and after; the weight is not turned round:

    acc[b, n, o] = sum over c, t of x_q[b, c + first, o * stride - padding + t * dilation] * weight[n, c, t]
    first = floor(n / (N / groups)) * C / groups, the first input channel of n's group

With `low`, `high`, `zero_point` from the operands, `v = acc + bias` and `>>` an arithmetic shift of an int64:

    qlinear         y_q = clamp(rne(f32(f32(v) * multiplier)) + zero_point, low, high)
    qlinear_float   y = f32(f32(v) * multiplier)
    qlinear_fixed   y_q = clamp(scale(v) + zero_point, low, high), where by the operand `rounding`
      single          scale(v) = (v * multiplier + (1 << shift >> 1)) >> shift
      tflite          h = (clamp(v << max(31 - shift, 0), -2**31, 2**31 - 1) * multiplier + 2**30) >> 31
                      scale(v) = sign(h) * ((abs(h) + (1 << right >> 1)) >> right), right = max(shift - 31, 0)
    qconv...        the same of every window

`rne` rounds to the nearest integer, ties to even, `f32` to the nearest float32, `clamp(v, a, b)` is min(max(v, a), b).
`(F1)` and the like are equations of docs/numerics.md of fxq.

## hex files

Two hex digits per byte: int8 -1 is `ff`, int32 -1 is `ffffffff`, float32 1.0 is `3f800000`. The
first line is a comment.

## Equations

Of the ops in this model, and of what they name, as they stand in fxq: `q_x` is the operand `x`, `q_w` the operand
`weight`, `conv` a convolution's `window` with `z_x`.
"""

"""A golden model's numbers as files, for people who build hardware: `GoldenModel.dump` writes a folder with them.

    manifest.json   the layers in order: op, formula, operands by name, result; all arrays with type and shape
    arrays.npz      every array under its name
    golden.h        the same for C: one `static const` array each, a `#define` for each number
    hex/*.hex       the same for `$readmemh`: one element per line, two's complement or the bits of a float
    README.md       what stands here and how to recompute a layer

The same model and inputs give the same bytes. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fxq import numerics
from fxq.errors import FileError
from fxq.numerics import Array

FORMAT, VERSION = "fxq-golden-files", 1
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
                "c": names[name],
                "hex": f"hex/{names[name]}.hex",
            }
            for name, array in arrays.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "README.md").write_text(README)
    with (folder / "arrays.npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    with (folder / "golden.h").open("w") as header:
        header.writelines(f"{line}\n" for line in _header(layers, arrays, names))
    (folder / "hex").mkdir()
    for name, array in arrays.items():
        with (folder / "hex" / f"{names[name]}.hex").open("w") as file_hex:
            file_hex.write(f"// {_title(name, array)}\n")
            file_hex.writelines(f"{word}\n" for word in _words(array))


def formula(op: str) -> str:
    """The equation of an op of fxq's, from the docstring of its NumPy truth; "" where it has none."""
    name = op.removeprefix("fxq.").removesuffix("_channels_last")  # the order in memory is no part of it
    function = getattr(numerics, name, None) if op.startswith("fxq.") else None
    return (function.__doc__ or "").partition("\n")[0].strip()


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
    """A name for each that C and file systems take: `fc1.acc+bias` -> `fc1_acc_plus_bias`."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"\W", "_", name.replace("+", "_plus_"), flags=re.ASCII)
        stem = stem if not stem[:1].isdigit() else f"_{stem}"
        unique, count = stem, 1
        while unique.lower() in taken:  # some file systems and all #defines know no case
            count += 1
            unique = f"{stem}_{count}"
        taken.add(unique.lower())
        found[name] = unique
    return found


def _title(name: str, array: Array) -> str:
    return f"{name}: {array.dtype} {list(array.shape)}, row major"


def _words(array: Array) -> Iterator[str]:
    """Each element as the hex digits of its bits."""
    flat = np.ascontiguousarray(array).ravel()
    digits = 2 * flat.itemsize
    return (f"{int(bits):0{digits}x}" for bits in flat.view(f"u{flat.itemsize}"))


def _header(layers: Sequence[Layer], arrays: Mapping[str, Array], names: Mapping[str, str]) -> Iterator[str]:
    yield from ("/* Written by fxq; README.md explains it. */", "#ifndef FXQ_GOLDEN_H", "#define FXQ_GOLDEN_H")
    yield from ("#include <math.h>", "#include <stdint.h>", "")
    stems = _identifiers(layer.name for layer in layers)
    for layer in layers:
        yield f"/* {layer.name}: {layer.op or 'torch'}  {formula(layer.op)}".rstrip() + " */"
        stem = stems[layer.name].upper()
        for operand, value in layer.operands.items():
            if isinstance(value, bool | int | float):
                yield f"#define {stem}_{operand.upper()} {_number(value)}"
    yield ""
    for name, array in arrays.items():
        yield f"/* {_title(name, array)} */"
        if not array.size:
            continue  # C has no empty arrays
        kind = _C_TYPES.get(str(array.dtype), f"{array.dtype}_t")
        yield f"static const {kind} {names[name]}[{array.size}] = {{"
        values = [_number(value) for value in array.ravel().tolist()]
        for start in range(0, len(values), _PER_LINE):
            yield f"  {', '.join(values[start : start + _PER_LINE])},"
        yield "};"
    yield "#endif"


def _number(value: bool | int | float) -> str:
    """A C literal of exactly this value."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NAN" if math.isnan(value) else "-INFINITY" if value < 0 else "INFINITY"
        return value.hex()
    value = int(value)
    if value == -(2**31) or value == -(2**63):
        return f"({value + 1} - 1)"  # C has no negative literals
    return str(value)


README = """# A golden model in files

Every constant of a quantized model, and every number that it computes for one set of inputs. Nothing here is rounded:
integers are themselves, floats are written with all their bits.

| file | what it holds |
|---|---|
| `manifest.json` | the layers in order, and a list of all arrays |
| `arrays.npz` | the arrays for NumPy: `np.load("arrays.npz")["fc1.weight"]` |
| `golden.h` | the arrays for C, flat and row major; `#define FC1_ZERO_POINT 3` for each number that a layer takes |
| `hex/` | the arrays for `$readmemh`, one element per line, row major |

## manifest.json

`layers`: in the order in which they run. Each has

- `name`: the module of the model, as in `GoldenModel.trace`; a second call of it is `fc1#2`
- `op`, `formula`: what it computes; `torch` where it is a float operation whose values torch gave. The functions named
  there, and those of ops whose formula refers to others, are in `fxq.numerics`, with all of their equations
- `line`: where the model's code calls it, "" where that is not known
- `operands`: what it reads, by name. `{"array": "fc1.weight"}` is an array; anything else is the value itself, floats
  with the bits of their float32 and float64 form
- `inside`: arrays on the way, such as the sums before requantization
- `result`: the array that it gives

`inputs` and `outputs` are those of the model. `arrays` gives `dtype` and `shape` of each array, its name in `golden.h`
(`c`) and its hex file (`hex`).

## Arrays of a linear layer `fc1`

| array | type | shape | what it is |
|---|---|---|---|
| `fc1.x_q` | uint8 | [..., K] | its input |
| `fc1.weight` | int8 | [N, K] | the weight, one row per output |
| `fc1.bias` | int32 | [N] | the bias in steps of s_x * s_w, less z_x * sum of the weight's row |
| `fc1.multiplier` | int32 or float32 | [N] | what a sum is multiplied with |
| `fc1.shift` | int32 | [N] | requant "fixed" only: the right shift of the 64-bit product |
| `fc1.acc` | int32 | [..., N] | sum over k of x_q[k] * weight[n, k] |
| `fc1.acc+bias` | int32 | [..., N] | the same plus the bias |
| `fc1.y_q`, `fc1.y` | uint8, float32 | [..., N] | the result |

With `low`, `high`, `zero_point` from the operands, `v = acc + bias` and `>>` an arithmetic shift of an int64:

    qlinear_fixed   y_q = clamp(scale(v) + zero_point, low, high), where by the operand `rounding`
      single          scale(v) = ((int64) v * multiplier + ((int64) 1 << shift >> 1)) >> shift
      tflite          scale(v) = RoundingDivideByPOT(SaturatingRoundingDoublingHighMul(v << left, multiplier), right),
                      as in gemmlowp; left = max(31 - shift, 0), right = max(shift - 31, 0); v << left saturates
    qconv_fixed     the same of every window; weight [N, C / groups, *kernel], bias folded over the whole kernel
    qlinear         y_q = clamp(rne((float) v * multiplier) + zero_point, low, high)
    qlinear_float   y = (float) v * multiplier

`rne` rounds to the nearest integer, ties to even, `f32` to the nearest float32. docs/numerics.md of fxq has the
equations of all operations.

## hex files

Two hex digits per byte: int8 -1 is `ff`, int32 -1 is `ffffffff`, float32 1.0 is `3f800000`. The
first line is a comment.
"""

"""The golden model: a quantized model as a NumPy program, with the same bits and every intermediate integer in sight.

    g = fxq.golden(qmodel);  g(x);  g.trace(x)["fc1.acc"];  g.save("model.npz")

Imports no torch: a saved program runs where torch is not installed. A step is one call of the graph; its op is a row of
a table in `fxq.golden_ops`, or of the caller's own.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fxq import golden_files
from fxq.errors import FileError, GoldenError, InputError
from fxq.golden_ops import ELEMENTWISE, NUMBERS, OPS, Op
from fxq.golden_program import Input, Program, Step, frozen, resolve
from fxq.numerics import Array

FORMAT, VERSION = "fxq-golden", 1


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
        remedy: str = "quantize a part of the model without them",
    ) -> None:
        """ops: rows of the caller's own; types: the user's classes that the model returns.

        record: what torch computes in the steps without an op, for one call. Raises `GoldenError` for such steps where
        there is no `record`; remedy: what it says to do about them.
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
                f"or {remedy}"
            )
        kinds = [inspect._ParameterKind(i.kind) for i in program.inputs]
        self.signature = inspect.Signature(
            [
                inspect.Parameter(
                    i.name, kind, default=resolve(i.default, {}) if i.optional else inspect.Parameter.empty
                )
                for i, kind in zip(program.inputs, kinds, strict=True)
            ]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, bit for bit; raises `InputError` and `GuardError` where the model raises."""
        return self._run(args, kwargs, None)

    def trace(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Every intermediate array of one call, by the user's module path.

        A product `fc1` gives `fc1.x_q`, `fc1.acc`, `fc1.acc+bias` (int32; a transposed convolution has this alone),
        `fc1.act` (float32, where an activation is part of it) and `fc1.y_q` (uint8) or `fc1.y` (float32); attention
        `attn.scores` (float32) and `attn.weights` (uint8); any other operation `<module>.<op>`. The second call of a
        module is `fc1#2`, the second op of a name `block.qadd#2`.
        """
        traced: dict[str, Array] = {}
        self._run(args, kwargs, traced)
        return traced

    def dump(self, path: str | Path, inputs: Any) -> Path:
        """Write all constants, and all that the model computes from `inputs`, as files for hardware: `golden_files`.

        path: a folder that is not there yet, or is empty; returned. inputs: an array, a tuple of positional arguments,
        or a dict of keyword arguments. Raises `FileError` where it cannot be written, `InputError` as the model does.
        """
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        env = self._values(args, inputs if isinstance(inputs, dict) else {}, None)
        files = golden_files.Files()
        refs: dict[str, Any] = {i.name: files.keep(f"input.{i.name}", env[i.name]) for i in self.program.inputs}
        given = dict(refs)
        for step in self.program.steps:
            refs[step.name] = self._write_down(step, env, refs, files)
        files.write(Path(path), given, resolve(self.program.output, refs))
        return Path(path)

    def _write_down(self, step: Step, env: dict[str, Any], refs: dict[str, Any], files: golden_files.Files) -> Any:
        """Keep the arrays of a step, and a layer if its value holds any; returns what stands for its value."""
        if step.op == "construct":
            return resolve(step.kwargs, _Refs(refs, files, self.program.constants)) or list(
                resolve(step.args, _Refs(refs, files, self.program.constants))[1:]
            )
        op = self.table.get(step.op)
        value = env[step.name]
        if not any(isinstance(item, np.ndarray) for item in (value if isinstance(value, tuple | list) else (value,))):
            return value
        operands = {}
        for name, tagged in _named_operands(step, op):
            constant = tagged.get("$node", "") if isinstance(tagged, dict) else ""
            if name == "weight" and op is not None and op.weight is not None:
                args, kwargs = resolve(step.args, env), resolve(step.kwargs, env)
                operands[name] = files.keep(f"{step.label}.weight", op.weight(*args, **kwargs))
            elif constant.startswith("constant ") and constant in env:
                operands[name] = files.keep(f"{step.label}.{name}", env[constant])
            else:
                operands[name] = resolve(tagged, _Refs(refs, files, self.program.constants))
        parts = {}
        if op is not None and op.parts is not None:
            parts = op.parts(*resolve(step.args, env), **resolve(step.kwargs, env))
        inside = [files.keep(f"{step.label}.{name}", array) for name, array in parts.items()]
        result = files.keep(f"{step.label}.{op.result}" if op is not None and op.result else step.label, value)
        files.layers.append(golden_files.Layer(step.label, step.op, step.line, operands, inside, result))
        return result

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
                constants = {name: frozen(file[f"constant{i}"]) for i, name in enumerate(plain["names"])}
            inputs, steps = (Input(**i) for i in plain["inputs"]), (Step(**s) for s in plain["steps"])
            program = Program(tuple(inputs), tuple(steps), plain["output"], constants)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} is damaged or not a golden model: {error}") from error
        return cls(program, ops=ops)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: dict[str, Array] | None) -> Any:
        return resolve(self.program.output, self._values(args, kwargs, traced))

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: dict[str, Array] | None) -> dict[str, Any]:
        """Every value of one call: by the name of its input or step, constants with their prefix."""
        env: dict[str, Any] = self._bind(args, kwargs)
        given = self.record(args, kwargs) if self.record is not None and self.islands else {}
        env.update((f"constant {name}", array) for name, array in self.program.constants.items())
        for step in self.program.steps:
            env[step.name] = value = self._step(step, env, traced) if step.op else given[step.name]
            if traced is not None and isinstance(value, np.ndarray):
                op = self.table.get(step.op)
                traced[f"{step.label}.{op.result}" if op is not None and op.result else step.label] = value
        return env

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
        args, kwargs = resolve(step.args, env), resolve(step.kwargs, env)
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


class _Refs(dict[str, Any]):
    """What stands for each value in files; a constant inside a list gets a name of its own when it is asked for.

    A constant that only torch reads is no array of the program: its own name stands for it.
    """

    def __init__(self, refs: Mapping[str, Any], files: golden_files.Files, constants: Mapping[str, Array]) -> None:
        super().__init__(refs)
        self.files, self.constants = files, constants

    def __missing__(self, name: str) -> Any:
        if name.removeprefix("constant ") not in self.constants:
            return name.removeprefix("constant ")
        self[name] = ref = self.files.keep(name.replace(" ", "."), self.constants[name.removeprefix("constant ")])
        return ref


def _named_operands(step: Step, op: Op | None) -> list[tuple[str, Any]]:
    """The tagged operands of a step by parameter name, or by position where the op does not tell."""
    positional = step.args["$tuple"]
    named = dict(step.kwargs.get("$dict", ())) if isinstance(step.kwargs, dict) else {}
    try:
        assert op is not None
        bound = inspect.signature(op.run).bind(*positional, **named).arguments
    except (AssertionError, ValueError):  # torch's own, or a builtin without a signature
        bound = {**{str(i): value for i, value in enumerate(positional)}, **named}
    return [(name, _spread(value) if isinstance(value, tuple) else value) for name, value in bound.items()]


def _spread(values: tuple[Any, ...]) -> Any:
    """What the operands of a `*dims` hold, given one by one or as a single list or (tagged) tuple."""
    one_list = len(values) == 1 and (
        isinstance(values[0], list) or (isinstance(values[0], dict) and "$tuple" in values[0])
    )
    return values[0] if one_list else list(values)


def _as_dtype(value: Any, dtype: str) -> Any:
    """`value` in `dtype` if it is an array or a number."""
    if isinstance(value, np.ndarray):
        return value.astype(dtype)
    return np.dtype(dtype).type(value) if isinstance(value, int | float) else value

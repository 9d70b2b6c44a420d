"""The golden model: a quantized model as a NumPy program, with the same bits and every intermediate integer in sight.

    g = fxq.golden(qmodel);  g(x);  g.trace(x)["fc1.acc"];  g.save("model.npz")

Imports no torch: a saved program runs where torch is not installed. A step is one call of the graph; its op is a row of
a table in `fxq.golden_ops`, or of the caller's own.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxq import golden_files
from fxq.errors import FileError, GoldenError, InputError
from fxq.golden_ops import ELEMENTWISE, NUMBERS, OPS, Name, Op
from fxq.numerics import Array

FORMAT, VERSION = "fxq-golden", 1


def canonical(target: str, *, on_tensors: bool) -> str:
    """The name in the tables of a target as `fxq.encoding.encode` writes it; "" for what can have no row.

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
        files.write(Path(path), given, _resolve(self.program.output, refs))
        return Path(path)

    def _write_down(self, step: Step, env: dict[str, Any], refs: dict[str, Any], files: golden_files.Files) -> Any:
        """Keep the arrays of a step, and a layer if its value holds any; returns what stands for its value."""
        if step.op == "construct":
            return _resolve(step.kwargs, _Refs(refs, files, self.program.constants)) or list(
                _resolve(step.args, _Refs(refs, files, self.program.constants))[1:]
            )
        op = self.table.get(step.op)
        value = env[step.name]
        if not any(isinstance(item, np.ndarray) for item in (value if isinstance(value, tuple | list) else (value,))):
            return value
        operands = {}
        for name, tagged in _named_operands(step, op):
            constant = tagged.get("$node", "") if isinstance(tagged, dict) else ""
            if name == "weight" and op is not None and op.weight is not None:
                args, kwargs = _resolve(step.args, env), _resolve(step.kwargs, env)
                operands[name] = files.keep(f"{step.label}.weight", op.weight(*args, **kwargs))
            elif constant.startswith("constant ") and constant in env:
                operands[name] = files.keep(f"{step.label}.{name}", env[constant])
            else:
                operands[name] = _resolve(tagged, _Refs(refs, files, self.program.constants))
        parts = {}
        if op is not None and op.parts is not None:
            parts = op.parts(*_resolve(step.args, env), **_resolve(step.kwargs, env))
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
                constants = {name: _frozen(file[f"constant{i}"]) for i, name in enumerate(plain["names"])}
            inputs, steps = (Input(**i) for i in plain["inputs"]), (Step(**s) for s in plain["steps"])
            program = Program(tuple(inputs), tuple(steps), plain["output"], constants)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} is damaged or not a golden model: {error}") from error
        return cls(program, ops=ops)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: dict[str, Array] | None) -> Any:
        return _resolve(self.program.output, self._values(args, kwargs, traced))

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
    """The program of a graph written down by `fxq.encoding.encode`, its constants as arrays.

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
        dtype = _dtype(entry["value"])
        if dtype == "bfloat16":
            raise GoldenError(f"{entry['target']} is bfloat16, which NumPy does not have; quantize in float32")
        inputs.append(Input(entry["target"], int(kind), bool(entry["args"]), default, dtype))
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
            return Name(f"torch.{content}")
        case "$device":
            return Name(content)
    raise GoldenError(f"a golden model knows no {tag}")


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
    return [(name, list(value) if isinstance(value, tuple) else value) for name, value in bound.items()]


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

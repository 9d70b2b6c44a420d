"""The program of a golden model: a quantized graph as plain data, one step for each call.

Operands are what JSON can hold, with tags: {"$node": name} is a value, {"$tuple": [...]} a tuple (`resolve`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.errors import GoldenError
from fxq.golden_ops import ELEMENTWISE, NUMBERS, OPS, Name
from fxq.numerics import Array


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
    """One call: `name = op(*args, **kwargs)`, operands as plain data with tags (`resolve`).

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
    kept = {name: frozen(constants[name]) for name in constants if f"constant {name}" in needed}
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
    """Where a trace shows a step: `<module>` for a product or attention, in no module `<op>`; else `<module>.<op>`.

    The second of a name has `#2` behind it.
    """
    module, _ = entry["origin"] or ("", "")
    if op in OPS and OPS[op].parts is not None:
        label = module or _short(entry["target"])
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


def resolve(value: Any, env: Mapping[str, Any]) -> Any:
    """A tagged value with what its tags stand for."""
    if isinstance(value, list):
        return [resolve(item, env) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "$node":
            return env[content]
        case "$tuple" | "$size":
            return tuple(resolve(item, env) for item in content)
        case "$dict":
            return {resolve(key, env): resolve(item, env) for key, item in content}
        case "$slice":
            return slice(*(resolve(item, env) for item in content))
        case "$ellipsis":
            return ...
        case "$torch":
            return Name(f"torch.{content}")
        case "$device":
            return Name(content)
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


def frozen(array: Array) -> Array:
    """A copy that nobody can write to."""
    copied = np.array(array)
    copied.setflags(write=False)
    return copied

"""A graph written down as plain data, and read again: what lies beneath pickles, files and the golden model.

fx pickles a GraphModule by tracing its code again, which loses names and `meta`. Here each node becomes a dict of plain
containers, so that a file holds no code; what is read calls torch's arithmetic and nothing else, unless it is trusted.
"""

from __future__ import annotations

import importlib
import keyword
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import _get_qualified_name

from fxq.errors import FileError
from fxq.expansion import Link
from fxq.graph import Value
from fxq.tracing.graph_functions import SignatureCodeGen, mutate
from fxq.tracing.origin import Origin

HOMES = frozenset(
    {
        "torch",
        "torch._C._fft",
        "torch._C._linalg",
        "torch._C._nn",
        "torch._C._special",
        "torch.functional",
        "torch.nn.functional",
        "torch.return_types",
        "_operator",
        "math",
        "fxq.spelling",
        "fxq.tracing",
    }
)
"""The modules whose functions a file may call without `trust`: arithmetic, no files and no processes."""
BUILTINS = frozenset(
    {"abs", "float", "getattr", "int", "len", "list", "max", "min", "pow", "round", "slice", "sum", "tuple"}
)
NO_ARITHMETIC = frozenset({"attrgetter", "call", "compile", "from_file", "itemgetter", "methodcaller"})
CONTAINER_METHODS = frozenset({"get", "items", "keys", "values"})


def encode(gm: GraphModule) -> dict[str, Any]:
    """The graph of `gm` and its constants as plain containers and tensors; `decode` is the inverse."""
    parameters = {path for path, _ in gm.named_parameters(remove_duplicate=False)}
    constants = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    codegen = gm.graph._codegen
    kinds = (codegen.positional_only, codegen.keyword_only) if isinstance(codegen, SignatureCodeGen) else (0, 0)
    return {
        "nodes": [_encode_node(node) for node in gm.graph.nodes],
        "constants": {path: _constant(gm, path) for path in sorted(constants)},
        "parameters": sorted(parameters & constants),
        "signature": list(kinds),
    }


def decode(data: dict[str, Any], modules: dict[str, nn.Module], *, trust: bool) -> GraphModule:
    """What `encode` wrote. modules: those that the graph calls, by path; trust: whether it may call others than torch.

    Raises `FileError` for what is not installed here and for what would need trust.
    """
    root = nn.Module()
    for path, module in modules.items():
        owner, name = _owner(root, path)
        owner.add_module(name, module)
    tied: dict[int, nn.Parameter] = {}
    for path, value in data["constants"].items():
        owner, name = _owner(root, path)
        if path in data["parameters"]:
            owner.register_parameter(name, tied.setdefault(id(value), nn.Parameter(value, requires_grad=False)))
        elif isinstance(value, Tensor):
            owner.register_buffer(name, value)
        else:
            setattr(owner, name, value)
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in data["nodes"]:
        target = entry["target"]
        if entry["op"] == "call_function":
            target = _function(target, trust=trust)
        args, kwargs = (_decode_value(entry[key], nodes, trust) for key in ("args", "kwargs"))
        _check_names(entry["op"], target, kwargs)
        methods = [target] if entry["op"] == "call_method" else args[1:2] if target in (getattr, mutate) else []
        unknown = [name for name in methods if not (isinstance(name, str) and _is_method(name))]
        if unknown and not trust:
            raise _untrusted(f"or reads {', '.join(map(repr, unknown))} of an object")
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        node.meta = {key: entry[key] for key in ("source", "qparams") if entry[key] is not None}
        node.meta["value"] = _decode_value(entry["value"], nodes, trust)
        if entry["origin"] is not None:
            node.meta["origin"] = Origin(*entry["origin"])
        if entry["inside"] is not None:
            node.meta["inside"] = tuple(map(_decode_link, entry["inside"]))
        nodes[entry["name"]] = node
    if any(data["signature"]):
        graph.set_codegen(SignatureCodeGen(*data["signature"]))
    graph.lint()
    return GraphModule(root, graph)


def _check_names(op: str, target: Any, kwargs: dict[str, Any]) -> None:
    """Raise `FileError` for names that fx would write into code and that are none: they might be code."""
    names = [*kwargs, *([target.removeprefix("**").removeprefix("*")] if op == "placeholder" else [])]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise FileError(f"the file has {name!r} where a name belongs; it is damaged, or made to run code")
    if op in ("get_attr", "call_module") and not (target.isprintable() and set(target).isdisjoint('"\\')):
        raise FileError(f"the file has {target!r} where a path belongs; it is damaged, or made to run code")


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parts, name = path.split(".")
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root, name


def _constant(gm: GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    value = getattr(gm.get_submodule(owner), name)
    return value.detach() if isinstance(value, Tensor) else value


def _encode_node(node: Node) -> dict[str, Any]:
    origin = node.meta.get("origin")
    return {
        "op": node.op,
        "name": node.name,
        "target": node.target if isinstance(node.target, str) else _name_of(node.target),
        "args": _encode(node.args),
        "kwargs": _encode(node.kwargs),
        "origin": [origin.module, origin.line] if origin is not None else None,
        "value": _encode(node.meta.get("value")),
        "source": node.meta.get("source"),
        "qparams": node.meta.get("qparams"),
        "inside": [_encode_link(link) for link in node.meta["inside"]] if "inside" in node.meta else None,
    }


def _encode_link(link: Link) -> dict[str, Any]:
    origin = [link.origin.module, link.origin.line] if link.origin is not None else None
    return {**vars(link), "origin": origin, "value": _encode(link.value)}


def _decode_link(data: dict[str, Any]) -> Link:
    origin = Origin(*data["origin"]) if data["origin"] is not None else None
    return Link(**{**data, "origin": origin, "value": _decode_value(data["value"], {}, trust=False)})


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target}"
    name = _get_qualified_name(target)
    name = name if "." in name else f"builtins.{name}"
    if _function(name, trust=True) is not target:
        raise FileError(
            f"the graph calls {target!r}, which cannot be found again as {name}; define it at a module's top level"
        )
    return name


def _function(name: str, *, trust: bool) -> Any:
    if name.startswith("op:"):
        namespace, packet, overload = name.removeprefix("op:").split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    parts = name.split(".")
    if not trust and parts[0] not in ("torch", "operator", "_operator", "math", "builtins", "fxq"):
        raise _untrusted(name)  # before it is imported, which runs code
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise FileError(f"the graph calls the function {name}, which is not installed here")
            found = getattr(found, part)
        if not trust and not _is_arithmetic(found, parts[-1]):
            raise _untrusted(name)
        return found
    raise FileError(f"the graph calls the function {name}, which is not installed here")


def _is_arithmetic(function: Any, name: str) -> bool:
    """Whether a function computes and does nothing else; where it was found says little (`torch.os.system`)."""
    home = getattr(function, "__module__", None)
    return name in BUILTINS if home == "builtins" else home in HOMES and name not in NO_ARITHMETIC


def _is_method(name: str) -> bool:
    """Whether a method's or attribute's name is one of tensors, none that leads out of them."""
    if name.startswith("_"):
        return name in vars(operator) and hasattr(Tensor, name) and name != "__call__"
    return (hasattr(Tensor, name) and name != "numpy") or name in CONTAINER_METHODS


def _untrusted(name: str) -> FileError:
    return FileError(f"the file calls {name}, which is no arithmetic of torch's; pass trust=True if you trust the file")


def _encode(value: Any) -> Any:
    """fx arguments as plain data: nodes, slices and torch's constants become tagged dicts."""
    if isinstance(value, Node):
        return {"$node": value.name}
    if isinstance(value, Value):
        return {"$value": [str(value.dtype), list(value.shape)]}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if type(value) is tuple or isinstance(value, tuple):
        return tuple(_encode(item) for item in value)
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"$dict": [(_encode(key), _encode(item)) for key, item in value.items()]}
    if isinstance(value, slice):
        return {"$slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if value is ...:
        return {"$ellipsis": True}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"$torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if value is None or isinstance(value, bool | int | float | str | complex):
        return value
    if callable(value):
        return {"$function": _name_of(value)}
    raise FileError(f"the graph holds a {type(value).__name__} as an argument, which cannot be written down")


def _decode_value(value: Any, nodes: dict[str, Node], trust: bool) -> Any:
    def inner(item: Any) -> Any:
        return _decode_value(item, nodes, trust)

    if isinstance(value, tuple):
        return tuple(inner(item) for item in value)
    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "$node":
            return nodes[content]
        case "$value":
            return Value(_torch_constant(content[0].removeprefix("torch.")), tuple(content[1]))
        case "$size":
            return torch.Size(content)
        case "$dict":
            return {inner(key): inner(item) for key, item in content}
        case "$slice":
            return slice(*(inner(item) for item in content))
        case "$ellipsis":
            return ...
        case "$torch":
            return _torch_constant(content)
        case "$device":
            return torch.device(content)
        case "$function":
            return _function(content, trust=trust)
    raise FileError(f"the file holds an unknown tag {tag!r}; it was written by another version of fxq")


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise FileError(f"the file names torch.{name}, which is no dtype, memory format or layout of this torch")
    return found

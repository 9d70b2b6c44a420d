"""The result: a GraphModule that keeps its report, its graph and its provenance through pickle, deepcopy and files.

fx pickles a GraphModule by tracing its code again, which loses names and `meta`. Here the graph is written down as
plain data instead, which also makes `save` and `load` safe: a file holds no code.
"""

from __future__ import annotations

import copy
import importlib
import operator
import pickle
import zipfile
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode, _format_target
from torch.fx.node import _get_qualified_name
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree

from fxq.decisions import Report
from fxq.errors import FileError, InputError
from fxq.expansion import Link, summary
from fxq.graph import STATE, Value
from fxq.outputs import dequantized, output_qparams
from fxq.qtypes import QParams
from fxq.tracing.graph_functions import SignatureCodeGen, mutate
from fxq.tracing.origin import Origin

FORMAT, VERSION = "fxq", 1
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


class QuantizedModule(GraphModule):
    """A GraphModule made by fxq; `report` says what became of every operation."""

    report: Report

    @classmethod
    def of(cls, gm: GraphModule, report: Report) -> QuantizedModule:
        """Take over a graph and its constants."""
        module = cls(gm, gm.graph)
        module.report = report
        module.meta[STATE] = gm.meta.get(STATE, ())
        for parameter in module.parameters():
            if parameter.is_leaf:  # those of a scripted module are computed
                parameter.requires_grad_(False)
        module.eval()
        return module

    @property
    def output_qparams(self) -> list[QParams | None]:
        """For each tensor that a call returns, in order: scale and zero point, None where it is not quantized.

        There are such tensors under `Recipe(outputs="uint8")`: x = scale * (q - zero_point).
        """
        return output_qparams(self.graph)

    def dequantize(self, outputs: Any) -> Any:
        """What a call returned, in its structure, with float32 for all that is quantized (`output_qparams`)."""
        return dequantized(outputs, self.output_qparams)

    @property
    def code(self) -> str:
        """The Python code of `forward`; the layers inside a chain stand above its call as comments."""
        lines = []
        chains = {node.name: node for node in self.graph.nodes if "inside" in node.meta}
        for line in super().code.splitlines():
            node = chains.get(line.partition("=")[0].strip())
            if node is not None:
                indent = line[: len(line) - len(line.lstrip())]
                lines += [f"{indent}# {name}: {op} {text}" for name, op, text in summary(self, node)]
            lines.append(line)
        return "\n".join(lines)

    def recompile(self) -> PythonCode:
        """As fx does it, but with a shorter way to `forward` and to the constants: of a small model, half the time.

        `code` shows `self.fc1.weight_packed`; what runs is `self._modules["fc1"]._buffers["weight_packed"]`, the same
        object without the search that `nn.Module.__getattr__` makes for each part of a path.
        """
        code = super().recompile()
        source = code.src
        for node in self.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                path = _format_target("self", str(node.target))
                source = source.replace(f"{node.name} = {path}", f"{node.name} = {self._direct(str(node.target))}")
        scope = dict(code.globals)
        exec(compile(source, f"<fxq {id(self)}>", "exec"), scope)
        type(self).forward = scope["forward"]
        # torch.compile counts compilations per code object and stops at eight: each model has its own.
        call = FunctionType(_call.__code__.replace(), globals(), "__call__")
        type(self).__call__ = call  # type: ignore[method-assign]
        return code

    def _direct(self, path: str) -> str:
        *owners, name = path.split(".")
        owner = self.get_submodule(".".join(owners))
        text = "self" + "".join(f"._modules[{part!r}]" for part in owners)
        for table in ("_buffers", "_parameters", "_modules"):
            if name in getattr(owner, table):
                return f"{text}.{table}[{name!r}]"
        return f"getattr({text}, {name!r})"

    def __reduce__(self) -> Any:
        return _decode, (encode(self), dict(self.named_modules_called()), True)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, QuantizedModule)
        copied.report = Report.from_dict(self.report.to_dict())
        return copied

    def named_modules_called(self) -> list[tuple[str, nn.Module]]:
        """The modules that the graph calls as they are, by path."""
        paths = dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        return [(path, self.get_submodule(path)) for path in paths]


_module_call = nn.Module.__call__


def _call(self: QuantizedModule, *args: Any, **kwargs: Any) -> Any:
    """What `nn.Module.__call__` does; the way through it only where a hook or a tracer may stand on it."""
    if (
        self._forward_hooks
        or self._forward_pre_hooks
        or self._compiled_call_impl is not None
        or nn.Module.__call__ is not _module_call
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or torch._C._get_tracing_state()
    ):
        return nn.Module.__call__(self, *args, **kwargs)
    if torch.is_grad_enabled():
        for value in (*args, *kwargs.values()) if kwargs else args:
            if getattr(value, "requires_grad", False):
                return _refuse_gradients(self.forward(*args, **kwargs), value)
    return self.forward(*args, **kwargs)


class _NoGradient(torch.autograd.Function):
    """The same numbers; whoever asks for their gradient learns that there is none, where torch would leave it None."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, cause: Tensor) -> Tensor:
        return output.detach().view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError("an integer model has no gradients; train with fxq.prepare_qat, or call it on x.detach()")


def _refuse_gradients(outputs: Any, cause: Tensor) -> Any:
    """`outputs`, of a call that `cause` wants a gradient of."""

    def refuse(output: Tensor) -> Tensor:
        refused: Tensor = _NoGradient.apply(output, cause)  # type: ignore[no-untyped-call]
        return refused if output.is_floating_point() else output

    return pytree.tree_map_only(Tensor, refuse, outputs)


def weight_bytes(gm: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    strided = [t if t.layout is torch.strided else t.coalesce().values() for t in (*gm.parameters(), *gm.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in strided}
    return sum(storages.values())


def encode(gm: QuantizedModule) -> dict[str, Any]:
    """`gm` as plain containers and tensors; `_decode` is the inverse."""
    parameters = {path for path, _ in gm.named_parameters(remove_duplicate=False)}
    constants = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    codegen = gm.graph._codegen
    kinds = (codegen.positional_only, codegen.keyword_only) if isinstance(codegen, SignatureCodeGen) else (0, 0)
    return {
        "format": FORMAT,
        "version": VERSION,
        "nodes": [_encode_node(node) for node in gm.graph.nodes],
        "constants": {path: _constant(gm, path) for path in sorted(constants)},
        "parameters": sorted(parameters & constants),
        "signature": list(kinds),
        "report": gm.report.to_dict(),
    }


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
            return Value(getattr(torch, content[0].removeprefix("torch.")), tuple(content[1]))
        case "$size":
            return torch.Size(content)
        case "$dict":
            return {inner(key): inner(item) for key, item in content}
        case "$slice":
            return slice(*(inner(item) for item in content))
        case "$ellipsis":
            return ...
        case "$torch":
            return getattr(torch, content)
        case "$device":
            return torch.device(content)
        case "$function":
            return _function(content, trust=trust)
    raise FileError(f"the file holds an unknown tag {tag!r}; it was written by another version of fxq")


def _decode(data: dict[str, Any], modules: dict[str, nn.Module], trust: bool) -> QuantizedModule:
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
        methods = [target] if entry["op"] == "call_method" else args[1:2] if target in (getattr, mutate) else []
        if not trust and not all(isinstance(name, str) and _is_method(name) for name in methods):
            raise _untrusted(f"{methods}")
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
    return QuantizedModule.of(GraphModule(root, graph), Report.from_dict(data["report"]))


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parts, name = path.split(".")
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root, name


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a quantized model to a file that `load` reads without running code from it.

    Raises `FileError` where the graph holds what cannot be written down.
    """
    if not isinstance(qmodel, QuantizedModule):
        raise FileError(f"fxq.save writes what fxq.quantize returns, not a {type(qmodel).__name__}")
    torch.save(_plain(qmodel), path)


def _plain(qmodel: QuantizedModule) -> dict[str, Any]:
    """`encode`, with the modules that it calls, out of which those that fxq made are taken and encoded likewise."""
    modules: dict[str, nn.Module] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, module in qmodel.named_modules_called():
        made = {name: m for name, m in module.named_modules(prefix=path) if isinstance(m, QuantizedModule)}
        outermost = {name: m for name, m in made.items() if not any(name.startswith(f"{other}.") for other in made)}
        modules[path] = copy.deepcopy(module, {id(m): nn.Module() for m in outermost.values()})
        inner |= {name: _plain(m) for name, m in outermost.items()}
    return {**encode(qmodel), "modules": modules, "inner": inner}


def _from_plain(data: dict[str, Any], trust: bool) -> QuantizedModule:
    inner = {path: _from_plain(part, trust) for path, part in data.get("inner", {}).items()}
    modules = {path: inner.get(path, module) for path, module in data["modules"].items()}
    qmodel = _decode(data, modules, trust)
    for path in inner.keys() - modules.keys():
        qmodel.set_submodule(path, inner[path])
    return qmodel


def load(path: str | Path, *, trust: bool = False) -> QuantizedModule:
    """Read a model that `save` wrote. trust: also unpickle modules and call functions that are not torch's.

    Raises `FileError` for a missing, damaged or foreign file, and for one that needs trust.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: no such file")
    _check_archive(path)
    classes = [c for c in vars(nn.modules).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    try:
        with torch.serialization.safe_globals([*classes, set]):
            data = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise FileError(
                f"{path} holds modules that are not torch's own; pass trust=True if you trust it: {error}"
            ) from error
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"{path} is not an fxq file")
    if data["version"] != VERSION:
        raise FileError(
            f"{path} has format version {data['version']}, this fxq reads {VERSION}; write it again with fxq.save"
        )
    return _from_plain(data, trust)


def _check_archive(path: str | Path) -> None:
    """Raise `FileError` unless the file is an archive all of whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    if broken is not None:
        raise FileError(f"{path} is damaged: the checksum of {broken} is wrong")

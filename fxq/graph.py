"""Tools on a `torch.fx` graph that every layer above shares: constants by path, rewriting with provenance, values.

A node's `meta` holds `origin` (where in the user's program it comes from), `source` (the node of the normalised float
graph whose value it stands for), `value` (what it computed on the examples: `Value`, or a plain Python object), `guess`
where that is but a guess until the graph is run, on quantized uint8 `qparams` (scale, zero point), and, where the graph
modifies its memory in place, `aliases` (what does).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, Target
from torch.multiprocessing.reductions import StorageWeakRef

from fxq.randomness import Randomness
from fxq.tracing.values import tensors


@dataclass(frozen=True)
class Value:
    """The dtype and shape that a node had on the examples."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def module_of(node: Node) -> str:
    """The user's module path that `node` comes from; "" is the root."""
    origin = node.meta.get("origin")
    return origin.module if origin is not None else ""


def common_module(nodes: Sequence[Node]) -> str:
    """The innermost module of the user's that holds what all of `nodes` come from."""
    paths = [module_of(node).split(".") for node in nodes]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def line_of(node: Node) -> str:
    """The user's `file:line` that `node` comes from; "" where unknown."""
    origin = node.meta.get("origin")
    return origin.line if origin is not None else ""


def place_of(node: Node) -> str:
    """`node` in the user's terms, for errors and reports: its module path or file:line, then its name."""
    place = module_of(node) or line_of(node) or "the root module"
    return f"{place} (%{node.name})"


def is_call(node: Node) -> bool:
    """Whether `node` computes something."""
    return node.op in ("call_function", "call_method", "call_module")


def is_tensor(node: object) -> bool:
    """Whether `node` is a node that had one tensor as its value."""
    return isinstance(node, Node) and isinstance(node.meta.get("value"), Value)


def is_float_tensor(node: object) -> bool:
    """Whether `node` is a node that had one float32 tensor as its value."""
    return is_tensor(node) and isinstance(node, Node) and node.meta["value"].dtype == torch.float32


def is_size(node: Node) -> bool:
    """Whether the value of `node` is an integer or several: a size, not numbers of a tensor."""
    value = node.meta.get("value")
    values = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def submodule(gm: GraphModule, node: Node) -> nn.Module:
    """The module that a call_module node calls."""
    assert node.op == "call_module"
    return gm.get_submodule(str(node.target))


def constant(gm: GraphModule, node: Node) -> Tensor:
    """The tensor of a get_attr node."""
    assert node.op == "get_attr", node.op
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name)
    assert isinstance(value, Tensor), (node.target, type(value))
    return value


SHARED = "shared"
"""In a graph module's `meta`: True where other graphs read its weights, which no pass may change or store anew then."""


def exclusive_constants(gm: GraphModule) -> set[Node]:
    """The get_attr nodes with one user each whose memory no other node reads, under any name, in any graph."""
    if gm.meta.get(SHARED):
        return set()
    holders: dict[int, list[Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.users:
            holders.setdefault(memory_of(constant(gm, node)), []).append(node)
    return {nodes[0] for nodes in holders.values() if len(nodes) == 1 and len(nodes[0].users) == 1}


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinity; takes no memory of the tensor's size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def drop_unread(gm: GraphModule, keep: str | None = None) -> None:
    """Forget the parameters and buffers that no node reads, itself or in a module that it calls, nor is in `keep`."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for path, _ in _constants(gm):
        owner, _, name = path.rpartition(".")
        inside = any(owner[:i] in called for i in range(len(owner) + 1) if owner[i : i + 1] in (".", ""))
        kept = keep is not None and path.startswith(f"{keep}.")
        if path not in read and not inside and not kept:
            delattr(gm.get_submodule(owner), name)


def set_constant(gm: GraphModule, path: str, tensor: Tensor) -> str:
    """Register `tensor` as a buffer at `path`, or at `path_1`, ... if that is taken; return the path used.

    A module that only code inside of a leaf calls may be named by a word of Python's, which no path in a graph can be.
    """
    path = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in path.split("."))
    owner_path, _, name = path.rpartition(".")
    owner: nn.Module = gm
    for part in owner_path.split(".") if owner_path else []:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    unique, count = name, 0
    while hasattr(owner, unique):
        count += 1
        unique = f"{name}_{count}"
    owner.register_buffer(unique, tensor)
    return f"{owner_path}.{unique}" if owner_path else unique


def get_attr(gm: GraphModule, path: str, like: Node) -> Node:
    """A get_attr node of `path` at the insertion point, with the provenance of `like`."""
    node = gm.graph.create_node("get_attr", path)
    node.meta["origin"] = like.meta.get("origin")
    tensor = constant(gm, node)
    node.meta["value"] = Value(tensor.dtype, tuple(tensor.shape))
    if is_state(gm, tensor):
        node.meta["aliases"] = path
    return node


def call(
    gm: GraphModule,
    target: Callable[..., Any] | str,
    args: tuple[Argument, ...],
    like: Node,
    qparams: tuple[float, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Node:
    """A call of a function, or of the module at the path `target`, with the provenance of `like`.

    qparams: scale and zero point of a result that is quantized uint8. dtype: of a tensor of the shape of `like`. Where
    neither is given, the value of `like` stands in until the graph is run.
    """
    op = "call_module" if isinstance(target, str) else "call_function"
    name = f"{module_of(like)}_{target_name(target).rpartition('.')[2]}".replace(".", "_").lstrip("_")
    node = gm.graph.create_node(op, target, args, name=name)
    node.meta = {key: value for key, value in like.meta.items() if key in ("origin", "source", "value")}
    if qparams is not None:
        node.meta["qparams"], dtype = qparams, torch.uint8
    value = node.meta.get("value")
    if dtype is not None and isinstance(value, Value):
        node.meta["value"] = Value(dtype, value.shape)
    else:
        node.meta["guess"] = True
    return node


def is_known(gm: GraphModule) -> bool:
    """Whether the `value` of every node is what it computes."""
    return all("value" in node.meta and "guess" not in node.meta for node in gm.graph.nodes)


def replace(
    gm: GraphModule,
    node: Node,
    target: Callable[..., Any],
    args: tuple[Argument, ...],
    qparams: tuple[float, int] | None = None,
    like: Node | None = None,
) -> Node:
    """Put a call of `target` in the place of `node`, with its users and its value, and the origin of `like` or `node`.

    `node` goes, and what only it read.
    """
    with gm.graph.inserting_before(node):
        new = call(gm, target, args, like or node, qparams)
    new.meta.pop("guess", None)
    new.meta.update({key: node.meta[key] for key in ("source", "value", "guess") if key in node.meta})
    bypass(gm, node, new)
    return new


def bypass(gm: GraphModule, node: Node, source: Node) -> None:
    """Let the users of `node` read `source` instead; `node` goes, and what only it read."""
    node.replace_all_uses_with(source)
    erase_unused(gm, node)


def erase_unused(gm: GraphModule, node: Node) -> None:
    """Erase `node` and what only it read; values with users, inputs and side effects stay."""
    if node._erased or node.users or node.op in ("placeholder", "output") or node.is_impure():
        return
    operands = node.all_input_nodes
    gm.graph.erase_node(node)
    for operand in operands:
        erase_unused(gm, operand)


def erase_unread(gm: GraphModule) -> int:
    """Erase what nobody reads and has no effect: no guard, nothing that works in place; returns the number of nodes."""

    def stays(node: Node) -> bool:
        return "aliases" in node.meta or (not is_call(node) and node.op != "get_attr") or node.is_impure()

    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code(is_impure_node=stays)
    return before - len(gm.graph.nodes)


def bind(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The call's values in placeholder order.

    Raises TypeError where the call does not fit the model's signature.
    """
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return [value for name, value in bound.arguments.items()]


class Interpreter(fx.Interpreter):
    """Runs a graph; what a node raises comes out as it was raised."""

    def __init__(self, gm: GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(gm, garbage_collect_values)
        self.extra_traceback = False


class _Recorder(Interpreter):
    """Runs a graph and remembers each node's dtype and shape in `meta["value"]`."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.failed: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.failed = n
        result = super().run_node(n)
        n.meta["value"] = _describe(result)
        n.meta.pop("guess", None)
        self.failed = None
        return result


def _describe(result: Any) -> Any:
    """A value to keep: tensors inside containers become `Value`s, so that no memory is held."""
    if isinstance(result, Tensor):
        return Value(result.dtype, tuple(result.shape))
    if type(result) is list:
        return [_describe(item) for item in result]
    if isinstance(result, tuple) and not isinstance(result, torch.Size):
        return tuple(_describe(item) for item in result)
    if isinstance(result, bool | int | float | str | torch.dtype | torch.device | torch.Size) or result is None:
        return result
    return f"<{type(result).__name__}>"


STATE = "state"
"""In a graph module's `meta`: the paths of the parameters and buffers that it modifies when it is run."""


def find_state(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Note in `meta[STATE]` which of its constants `gm` modifies; where its trace does not know, run a copy to see.

    Raises `NodeError` from what a node raised.
    """
    if gm.meta.get("stateless"):
        gm.meta[STATE] = ()
        return
    probe = copy.deepcopy(gm)
    versions = {path: tensor._version for path, tensor in _constants(probe)}
    finder = _Mutations(probe)
    try:
        with torch.no_grad(), Randomness():
            finder.run(*bind(probe, args, kwargs))
    except Exception as error:
        if finder.failed is None:
            raise
        raise NodeError(finder.failed) from error
    gm.meta[STATE] = tuple(
        path
        for path, tensor in _constants(probe)
        if tensor._version != versions[path] or memory_of(tensor) in finder.modified  # `.data` has its own version
    )


def is_state(gm: GraphModule, tensor: Tensor) -> bool:
    """Whether `gm` modifies the memory of `tensor` (`find_state`)."""
    state = gm.meta.get(STATE, ())
    constants = _constants(gm) if state else []
    return any(path in state and memory_of(other) == memory_of(tensor) for path, other in constants)


def memory_of(tensor: Tensor) -> int:
    """What tensors have in common that share memory; a sparse one has none, and is taken for memory of its own."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


@contextlib.contextmanager
def unchanged(gm: GraphModule) -> Iterator[None]:
    """Let what runs `gm` leave nothing behind: no constant modified (`restored`), no random number drawn."""
    with Randomness(), restored(gm):
        yield


@contextlib.contextmanager
def restored(gm: GraphModule) -> Iterator[None]:
    """Give the constants that `gm` modifies (`find_state`) the values back that they have now."""
    state = gm.meta.get(STATE, ())
    saved = [(tensor, tensor.detach().clone()) for path, tensor in _constants(gm) if path in state] if state else []
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)


def _constants(gm: GraphModule) -> list[tuple[str, Tensor]]:
    return [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]


_weak: Callable[[torch.UntypedStorage], object] = StorageWeakRef


class _Mutations(Interpreter):
    """Runs a graph and finds, by tensors' version counters, which nodes modify memory that earlier nodes hold."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.holders: dict[int, list[Node]] = {}
        self.addresses: list[Any] = []
        self.found: dict[Node, tuple[Node, ...]] = {}
        self.modified: set[int] = set()
        self.failed: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.failed = n
        operands = [tensor for node in n.all_input_nodes for tensor in tensors(self.env[node])]
        versions = [tensor._version for tensor in operands]
        result = super().run_node(n)
        changed = {memory_of(t) for t, version in zip(operands, versions, strict=True) if t._version != version}
        if changed:
            self.found[n] = tuple(node for storage in changed for node in self.holders[storage])
            self.modified |= changed
        for tensor in tensors(result):
            # So that no later tensor gets the same address; the memory itself may go.
            strided = tensor.layout is torch.strided
            self.addresses.append(_weak(tensor.untyped_storage()) if strided else tensor)
            self.holders.setdefault(memory_of(tensor), []).append(n)
        self.failed = None
        return result


def mutations(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Node, tuple[Node, ...]]:
    """For each node that works in place: the earlier nodes whose memory it modified. Runs `gm` once."""
    finder = _Mutations(gm)
    with torch.no_grad(), unchanged(gm):
        finder.run(*bind(gm, args, kwargs))
    return finder.found


class NodeError(Exception):
    """A node raised while a graph was run; `node` is that node, `__cause__` what it raised."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


def propagate(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `gm` and record the value of every node; returns the output. Raises `NodeError` from what a node raised."""
    recorder = _Recorder(gm)
    try:
        with torch.no_grad(), unchanged(gm):
            return recorder.run(*bind(gm, args, kwargs))
    except Exception as error:
        if recorder.failed is None:
            raise
        raise NodeError(recorder.failed) from error


def target_name(target: Target) -> str:
    """A target as people write it: `fxq.qlinear`, `relu`, `add`, `layers.1`."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))

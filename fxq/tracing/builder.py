"""A graph under construction: which node each live tensor is the value of, and how values become arguments of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fxq.errors import TraceError
from fxq.tracing.graph_functions import UnpicklingTracer
from fxq.tracing.origin import Origin, user_line
from fxq.tracing.spelling import LITERALS
from fxq.tracing.symbols import is_symbol
from fxq.tracing.values import concrete, named_tensors, storage, version

REMEDY = (
    "write it with torch functions (torch.where, ...), or pass frontend='leaf': the model's own code then stays float, "
    "as a leaf, and the modules in it are quantized"
)


class Builder:
    """The graph so far.

    `varying` nodes depend on the inputs; `pure` ones go again when nothing uses them; `paths` ends with the module that
    is running; `at` is the user's line where no code of theirs is running; `busy` says that torch is used for the
    trace's own sake.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.graph = fx.Graph(tracer_cls=UnpicklingTracer)
        self.nodes: Any = WeakTensorKeyDictionary()
        self.attributes = dict(named_tensors(root))
        self.versions = {name: version(tensor) for name, tensor in self.attributes.items()}
        self.names = {id(tensor): name for name, tensor in reversed(self.attributes.items())}
        self.constants: dict[str, torch.Tensor] = {}
        self.sharing: dict[int, list[Any]] = {}
        self.whole: dict[int, tuple[Any, fx.Node]] = {}
        self.inputs: list[tuple[fx.Node, dict[str, Any]]] = []
        self.texts: dict[fx.Node, str] = {}
        self.varying: set[fx.Node] = set()
        self.pure: set[fx.Node] = set()
        self.paths = [""]
        self.refusal: TraceError | None = None
        self.busy = False
        self.at: str | None = None

    def line(self) -> str:
        """Return file:line of the user's code that is running."""
        return user_line() if self.at is None else self.at

    def refuse(self, what: str, final: bool = False) -> NoReturn:
        """Raise `TraceError` about the user's line; it stands even where the model's code catches it."""
        module = f" (module '{self.paths[-1]}')" if self.paths[-1] else ""
        error = TraceError(f"{self.line() or 'the model'}{module} {what}", REMEDY, final=final)
        self.refusal = self.refusal or error
        raise error

    def execute(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute on the values, with nothing recorded."""
        outer, self.busy = self.busy, True
        try:
            return function(*concrete(args), **concrete(kwargs))
        finally:
            self.busy = outer

    @contextmanager
    def working(self) -> Iterator[None]:
        """Use torch for the recorder's own sake, unrecorded."""
        outer, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = outer

    def create(
        self, op: str, target: Any, args: Any = (), kwargs: Any = None, *, pure: bool = False, line: str | None = None
    ) -> fx.Node:
        """Append a node, with where it comes from; `pure` ones go again when nothing uses them."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta["origin"] = Origin(self.paths[-1], self.line() if line is None else line)
        if any(source in self.varying for source in node.all_input_nodes):
            self.varying.add(node)
        if pure:
            self.pure.add(node)
        return node

    def placeholder(self, name: str, default: tuple[Any, ...]) -> fx.Node:
        """Append a placeholder."""
        node = self.create("placeholder", name, default)
        self.texts[node] = name
        self.varying.add(node)
        return node

    def input(self, tensor: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """Know an input tensor by its node."""
        self.remember(tensor, node)
        self.inputs.append((node, {"rank": tensor.dim(), "dtype": tensor.dtype}))
        return tensor

    def remember(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Know a tensor by a node from now on."""
        self.nodes[tensor] = node
        with self.working():
            self.sharing.setdefault(storage(tensor), []).append(TensorWeakRef(tensor))

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """Tell whether a change of a tensor can be seen by other means than its node: through a view, from outside."""
        node = self.node_of(tensor)
        if node.op == "get_attr" or any(node is source for source, _ in self.inputs):
            return True
        with self.working():
            others = (other() for other in self.sharing.get(storage(tensor), []))
            return any(other is not None and other is not tensor for other in others)

    def text(self, node: fx.Node) -> str:
        """Name a node as the user would, as far as known."""
        return self.texts.get(node, str(node.target) if node.op in ("get_attr", "call_module") else node.name)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a tensor; one that no node gave is the model's, or a constant from outside."""
        node: fx.Node | None = self.nodes.get(tensor)
        if node is None:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                self.refuse("calls torch.func (vmap, grad), which a graph cannot hold")
            name = self.names.get(id(tensor))
            if name is None:
                free = (f"_tensor_constant{i}" for i in count() if not hasattr(self.root, f"_tensor_constant{i}"))
                name = next(name for name in free if name not in self.constants)
                self.constants[name] = self.attributes[name] = tensor
                self.versions[name] = version(tensor)
            node = self.create("get_attr", name, pure=True)
            self.remember(tensor, node)
        return node

    def arg(self, value: Any) -> Any:  # noqa: RET503
        """Return a value as fx wants it among a node's arguments."""
        if is_symbol(value):
            return value.fx_node
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, np.generic):  # Before the literals: np.float64 is a float, but does not print as one.
            return value.item()
        if isinstance(value, LITERALS):
            return value
        if id(value) in self.whole:
            return self.whole[id(value)][1]
        if is_dataclass(value) and not isinstance(value, type):
            items = {field.name: self.arg(getattr(value, field.name)) for field in fields(value) if field.init}
            return self.construct(value, (), items)
        if isinstance(value, dict):
            items = {key: self.arg(item) for key, item in value.items()}
            return items if type(value) is dict else self.construct(value, (items,), {})
        if isinstance(value, slice):
            return slice(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        if isinstance(value, list | tuple | range):
            parts = [self.arg(item) for item in value]
            if hasattr(value, "_fields"):
                return self.construct(value, tuple(parts), {})
            if hasattr(value, "n_sequence_fields"):
                return self.create("call_function", type(value), (tuple(parts),))
            return tuple(parts) if isinstance(value, tuple) else parts
        self.refuse(f"passes or returns a {type(value).__name__}, which a graph cannot hold")

    def construct(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Append the call that makes a value of the user's type."""
        node = self.create("call_function", type(value), args, kwargs)
        # Else unpickling calls the type and keeps what it holds. fx cannot wrap torch's own, whose names have dots.
        node.meta["is_wrapped"] = not type(value).__module__.startswith("torch.")
        return node

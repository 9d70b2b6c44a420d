"""Runs a model on its example inputs and writes down, as an fx graph, every torch function that it calls.

The tensors that the model's code sees are ordinary tensors, so whatever it asks of them has its usual answer. A
`TorchFunctionMode` stands between the code and torch: each call is executed, and its result is remembered as the value
of a new node. Sizes and number arguments are symbols (`fxq.tracing.symbols`). A `TorchDispatchMode` below it catches
what reaches torch without passing through a torch function (scripted functions, C++ extensions).
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxq.errors import TraceError
from fxq.tracing import aten
from fxq.tracing.builder import REMEDY
from fxq.tracing.graph_functions import TracingWarning, guard, length, mutate
from fxq.tracing.origin import Origin, enter, line_of
from fxq.tracing.questions import Questions
from fxq.tracing.spelling import (
    COUNTED,
    DTYPE,
    RANDOM,
    RANK,
    SILENT,
    SIZES,
    VALUES,
    Spelling,
    is_leaf,
    opened,
    spelling,
)
from fxq.tracing.symbols import Source, is_symbol
from fxq.tracing.values import ancestors, concrete, symbols, tensors, traced, version

_FACTS = ("is_", "has_", "get_device", "_")
"""How functions begin that tell what kind of tensor a tensor is."""


class Recorder(Questions):
    """One trace: the graph so far, and which node each live tensor is the value of."""

    def __init__(
        self,
        root: nn.Module,
        leaves: tuple[type[nn.Module] | str, ...],
        opaque: Collection[str] = (),
        watch: bool = False,
    ) -> None:
        """Stand in for every module of `root`; `leaves` and the modules at the paths `opaque` stay one call."""
        super().__init__(root)
        self.untraceable: dict[str, str] = {}
        self.swallowed: TraceError | None = None
        self.buffers = {module: dict(module._buffers) for module in root.modules()}
        self.read: set[str] = set()
        self.impure: set[str] = set()
        self.writes = False  # to parameters or buffers, where the model's eager runs do not
        self.thread = threading.get_ident()
        self.watched: dict[str, torch.Tensor] | None = {} if watch else None
        for path, module in root.named_modules():
            leaf = is_leaf(module, path, leaves) or path in opaque
            module.__dict__["forward"] = partial(self.module, path, leaf, module.forward)

    # Running the model.

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model under the recorder and return its output."""
        with torch.no_grad(), _Escapes(self), _Functions(self):
            return enter(self.root, *args, **kwargs)

    def module(self, path: str, leaf: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a module's forward: record a leaf as one call, follow the code of any other."""
        if self.busy:
            return forward(*args, **kwargs)
        self.paths.append(path)
        try:
            return self.leaf(path, forward, args, kwargs) if leaf else self.follow(path, forward, args, kwargs)
        finally:
            self.paths.pop()

    def leaf(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a module as one call."""
        # Without the modes, since torch.cond compiles itself, which must not see them.
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return self.record(forward, args, kwargs, lambda: ("call_module", path, args, kwargs), always=True)

    def follow(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's code; where that cannot be recorded, note why and go on as if the module were a leaf."""
        try:
            result = forward(*args, **kwargs)
            if self.refusal is not None:
                self.refusal.caught = True
                self.swallowed = self.refusal
                raise self.refusal
            return result
        except Exception as error:
            if not path:
                raise
            line = line_of(error)
            why = error.what if isinstance(error, TraceError) else f"{line} fails while it is traced: {error}"
            self.refusal = None
            result = self.leaf(path, forward, args, kwargs)
            self.untraceable[path] = why
            return result

    def wrapped(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a function that the user gave to `torch.fx.wrap`: one call, whatever is inside."""
        if self.busy or self.thread != threading.get_ident() or not traced((args, kwargs)):
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            result = self.record(function, args, kwargs, lambda: ("call_function", function, args, kwargs), always=True)
        next(node for node in reversed(self.graph.nodes) if node.target is function).meta["is_wrapped"] = True
        return result

    def compiling(self, compile: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for `torch.compile`, which torch.cond and its like call, and which cannot see through a recorder."""
        if not self.busy and self.thread == threading.get_ident():
            self.refuse("compiles a part of itself (torch.cond, torch.compile)")
        return compile(*args, **kwargs)

    def printing(self, print: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Stand in for `print`: the graph will not print."""
        if not self.busy and self.thread == threading.get_ident():
            warnings.warn(f"{self.line()} prints while it is traced; the graph does not", TracingWarning, stacklevel=2)
        print(*args, **kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for a torch function: answer what it asks, or execute and record it."""
        spelled = aten.function_of(function) if isinstance(function, torch._ops.OpOverload) else None
        if spelled is not None:
            with _Functions(self):
                return spelled(*args, **kwargs)
        name = function.__name__
        if name == "__get__":
            return self.get(function, args[0])
        if name in SILENT or (args and isinstance(args[0], np.ndarray)):
            return self.execute(function, args, kwargs)
        if name == "requires_grad_":
            return args[0]
        if name == "__set__" and function.__self__.__name__ not in ("requires_grad", "grad"):  # type: ignore[attr-defined]
            self.refuse(f"assigns to a tensor's `{function.__self__.__name__}`")  # type: ignore[attr-defined]
        if name in ("__deepcopy__", "__copy__"):
            return self.call(torch.Tensor.clone, args[:1], {})
        if function is F.multi_head_attention_forward:
            with _Functions(self):
                return opened(function)(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and self.varies(args[0]):
            if name in RANK or name in DTYPE:
                return self.ask(name, function, args)
            if name == "size":
                dims = self.sizes(args[0])
                return (
                    dims[operator.index(args[1] if len(args) > 1 else kwargs["dim"])]
                    if len(args) > 1 or kwargs
                    else dims
                )
            if name == "__len__":
                return operator.index(self.sizes(args[0])[0])
            if name in SIZES:
                return self.number(name, self.execute(function, args, kwargs), args, kwargs, Source.SIZE)
            if name == "item":
                value = self.execute(function, args, kwargs)
                return self.number(name, value, args, kwargs, Source.DATA)
        if name in VALUES or name == "item":
            for tensor in tensors((args, kwargs)):
                if self.varies(tensor):
                    of = self.text(self.node_of(tensor))
                    self.refuse(f"needs the value of a tensor for Python (`{name.strip('_')}` of `{of}`)")
                self.read |= {str(node.target) for node in ancestors(self.node_of(tensor)) if node.op == "get_attr"}
            return self.execute(function, args, kwargs)
        if name == "is_same_size":
            node = self.create("call_function", function, self.arg(args), pure=True)
            return self.decide(self.symbol(self.execute(function, args, kwargs), node, name, Source.SIZE))
        if name in COUNTED and args and not self.varies(args[0]):
            # A parameter's parts (of q, k and v) have the sizes that they have, whichever input's they were taken from.
            for symbol in symbols((args, kwargs)):
                self.decide(symbol)
            args, kwargs = concrete(args), concrete(kwargs)
        return self.record(function, args, kwargs, lambda: spelling(function, name, args, kwargs))

    def get(self, getter: Callable[..., Any], tensor: torch.Tensor) -> Any:
        """Answer a tensor's property."""
        descriptor = getter.__self__  # type: ignore[attr-defined]
        name = getattr(getattr(descriptor, "fget", descriptor), "__name__", "")
        if self.varies(tensor):
            if name == "shape":
                return self.sizes(tensor)
            if name in RANK or name in DTYPE:
                return self.ask(name, getter, (tensor,))
            if name in SIZES:
                return self.number(name, self.execute(getter, (tensor,), {}), (tensor,), {}, Source.SIZE, getattr)
        return self.record(getter, (tensor,), {}, lambda: ("call_function", getattr, (tensor, name), {}))

    def record(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        spelling: Callable[[], Spelling],
        always: bool = False,
    ) -> Any:
        """Execute a call; when it gives or changes a tensor, make it a node and know its results by that node."""
        before = {id(tensor): version(tensor) for tensor in tensors((args, kwargs))}
        name = getattr(function, "__name__", "")
        result = self.execute(function, args, kwargs)
        changed = [tensor for tensor in tensors((args, kwargs)) if version(tensor) != before[id(tensor)]]
        in_place = bool(args) and name.endswith("_") and not name.endswith("__")
        if in_place and not changed and args[0].is_inference():
            changed = [args[0]]  # Inference tensors do not count their changes.
        if not (always or changed or name.startswith("_assert") or any(True for _ in tensors(result))):
            if type(result) in (bool, int, float, complex) and not name.startswith(_FACTS):
                for tensor in tensors((args, kwargs)):
                    if self.varies(tensor):
                        self.refuse(f"reads a number into Python (`{name}` of `{self.text(self.node_of(tensor))}`)")
            return result
        op, target, args, kwargs = spelling()
        if changed and self.is_shared(changed[0]):
            if op == "call_module":
                self.impure.add(target)
            elif kwargs.get("inplace") or "out" in kwargs:
                plain = {key: False if key == "inplace" else value for key, value in kwargs.items() if key != "out"}
                node = self.create(op, target, self.arg(args), self.arg(plain))
                self.create("call_function", mutate, (self.node_of(changed[0]), "copy_", node))
                return result
            elif in_place:
                self.create("call_function", mutate, self.arg((args[0], name, *args[1:])), self.arg(kwargs))
                return result
        node = self.create(op, target, self.arg(args), self.arg(kwargs))
        if name.startswith("rand") or name.rstrip("_") in RANDOM:
            self.varying.add(node)
        if name in COUNTED and isinstance(result, list | tuple) and node in self.varying:
            count = self.create("call_function", length, (node,), pure=True)
            self.decide(self.symbol(len(result), count, f"len({self.text(node)})", Source.SIZE))
        return self.know(result, node, before)

    def know(self, result: Any, node: fx.Node, before: dict[int, int]) -> Any:
        """Remember each tensor of a result by a node."""
        if isinstance(result, torch.Tensor):
            with self.working():
                plain = type(result) in (torch.Tensor, nn.Parameter, nn.Buffer) and not result.is_nested
            if not plain:
                kind = (
                    "nested tensor" if type(result) is torch.Tensor else f"tensor of the class {type(result).__name__}"
                )
                self.refuse(f"makes a {kind}, which a graph cannot hold")
            if before.get(id(result)) == version(result) and not result.is_inference():
                # A call that hands back its argument as it was (`.contiguous()`, `.to()`) must not rename it.
                with self.working():
                    result = result.detach()
            self.remember(result, node)
            if self.watched is not None:
                with self.working():
                    self.watched[node.name] = result.detach().clone()
            return result
        if is_dataclass(result) and not isinstance(result, type):
            for field in fields(result):
                item = self.know_part(getattr(result, field.name), getattr, node, field.name, before)
                object.__setattr__(result, field.name, item)
            return result
        if isinstance(result, dict):
            for key, item in result.items():
                result[key] = self.know_part(item, operator.getitem, node, key, before)
            return result
        if isinstance(result, list | tuple):
            items = [self.know_part(item, operator.getitem, node, i, before) for i, item in enumerate(result)]
            known = type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
            if isinstance(known, tuple) and known:
                self.whole[id(known)] = known, node
            return known
        if isinstance(result, int | float) and node in self.varying:
            return self.symbol(result, node, self.text(node), Source.DATA)
        return result

    def know_part(self, item: Any, getter: Callable[..., Any], node: fx.Node, key: Any, before: dict[int, int]) -> Any:
        """`know` one part of a result."""
        if item is None or isinstance(item, str):
            return item
        return self.know(item, self.create("call_function", getter, (node, key), pure=True), before)

    # The end of the trace.

    def finish(self, output: Any) -> dict[str, torch.Tensor]:
        """Complete the graph with its output; return the constants that it refers to by name."""
        # Each tensor of the output has a node of its own, but for those in types of torch's, which no code can spell.
        self.whole = {key: known for key, known in self.whole.items() if hasattr(known[0], "n_sequence_fields")}
        result = self.arg(output)
        self._keep_rebound_buffers()
        node = self.graph.output(result)
        node.meta["origin"] = Origin("", "")
        self._guard_inputs()
        for node in reversed(self.graph.nodes):
            if node in self.pure and not node.users:
                self.graph.erase_node(node)
        changed = {name for name, tensor in self.attributes.items() if version(tensor) != self.versions[name]}
        if changed & set(self.constants):
            raise TraceError("the model changes a tensor that it did not make with torch functions", REMEDY)
        if lasting := sorted(changed & self.read):
            raise TraceError(
                f"the model reads the value of `{lasting[0]}` into Python and changes it, "
                "so each call may decide differently",
                REMEDY,
                module=lasting[0].rpartition(".")[0],
            )
        return self.constants

    def _keep_rebound_buffers(self) -> None:
        """`self.buffer = tensor` becomes a copy into the graph's own buffer; anything else left on a module is lost."""
        for path, module in self.root.named_modules():
            prefix = f"{path}." if path else ""
            for name, buffer in module._buffers.items():
                before = self.buffers[module].get(name)
                if buffer is not before and buffer is not None:
                    if before is None or (before.shape, before.dtype) != (buffer.shape, buffer.dtype):
                        raise TraceError(
                            f"the model replaces its buffer `{prefix}{name}` by one of another shape or dtype",
                            REMEDY,
                            module=path,
                        )
                    target = self.create("get_attr", prefix + name, line="")
                    self.create("call_function", mutate, (target, "copy_", self.node_of(buffer)), line="")
            for name, value in module.__dict__.items():
                if name not in ("_parameters", "_buffers", "_modules", "forward") and self._holds_traced(value):
                    warnings.warn(
                        f"the model leaves a result of its forward in `{prefix}{name}`; the traced graph does not",
                        TracingWarning,
                        stacklevel=4,
                    )

    def _holds_traced(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            node = self.nodes.get(value)
            return node is not None and node.op != "get_attr"
        if isinstance(value, dict):
            return any(self._holds_traced(item) for item in value.values())
        return is_symbol(value) or (isinstance(value, list | tuple) and any(self._holds_traced(item) for item in value))

    def _guard_inputs(self) -> None:
        """Guard rank and dtype of the inputs where the model asked for any: they decide every rank and dtype inside."""
        body = next(node for node in self.graph.nodes if node.op != "placeholder")
        for node, facts in self.inputs:
            with self.graph.inserting_before(body if node.op == "placeholder" else node.next):
                for fact, line in self.asked.items():
                    if fact == "rank":
                        asked = self.create("call_method", "dim", (node,), line=line)
                    else:
                        asked = self.create("call_function", getattr, (node, "dtype"), line=line)
                    relied = f"{line or 'the model'} relied on the {fact} of its tensors"
                    message = f"{relied}, and `{self.text(node)}` had {fact} {facts[fact]}"
                    self.create("call_function", guard, (asked, facts[fact], message), line=line)


class _Functions(TorchFunctionMode):
    """Hands every torch function to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.busy:
            return function(*args, **(kwargs or {}))
        return self.recorder.call(function, args, kwargs or {})


class _Escapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the recorder those operators on traced tensors that no torch function led to."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.recorder
        if recorder.busy or not any(
            recorder.nodes.get(tensor) in recorder.varying for tensor in tensors((args, kwargs))
        ):
            with recorder.working():
                return function(*args, **(kwargs or {}))
        return recorder.call(function, args, kwargs or {})

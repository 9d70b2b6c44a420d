"""The second front end: a model captured by `torch.export`, run under the recorder in the place of its own code.

The ATen graph of `torch.export` is computed node by node, on the model's own parameters, and the recorder gives its
operators the user's spelling (`fxq.tracing.aten`), so that what it writes down has the form of every model. Each size
that `torch.export` took for fixed is decided on, which makes it a guard, and so is each relation of sizes that it
relied on.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxq.errors import TraceError
from fxq.tracing.origin import is_internal
from fxq.tracing.recorder import Recorder
from fxq.tracing.symbols import is_symbol

Call = tuple[tuple[Any, ...], dict[str, Any]]

_INLINED = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
"""Operators that compute a graph in a certain state of torch (no_grad, autocast)."""


def export(model: nn.Module, call: Call) -> ExportedProgram:
    """Capture a model, with the first dimension of each input dynamic where that is possible.

    Raises `TraceError` with what `torch.export` says.
    """
    # Of the user's own tensors torch.export would mark the dynamic dimensions.
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), tuple(call))
    dynamic = pytree.tree_map(
        lambda leaf: {0: Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] > 1 else None,
        (args, dict(kwargs)),
    )
    shapes = (*dynamic[0], *dynamic[1].values())
    try:
        with torch.no_grad(), warnings.catch_warnings(), _unheard():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes or None, strict=False)
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise TraceError(f"torch.export: {type(error).__name__}: {text}") from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what torch logs and prints of a graph that it refuses: the error says it."""

    def is_anothers(record: logging.LogRecord) -> bool:
        return record.thread != threading.get_ident()

    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("fx.experimental.symbolic_shapes", "_subclasses.fake_tensor")
    ]
    for logger in loggers:
        logger.addFilter(is_anothers)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_anothers)


class Exported:
    """Stands as the forward of the copy of a model that is recorded; `recorder` is to be set."""

    recorder: Recorder

    def __init__(self, program: ExportedProgram, root: nn.Module, several: bool = False) -> None:
        """several: whether each first dimension is more than one, as `torch.export` takes for granted."""
        self.program, self.root, self.several = program, root, several

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the captured graph, and what it leaves in buffers and inputs."""
        program, signature = self.program, self.program.graph_signature
        leaves = iter(pytree.tree_leaves((args, kwargs), is_leaf=is_symbol))
        inputs: list[Any] = []
        for spec in signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(next(leaves))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                inputs.append(operator.attrgetter(str(spec.target))(self.root))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                inputs.append(program.constants[str(spec.target)])
            else:
                raise TraceError(f"torch.export gives the graph a {spec.kind.name}, which a graph cannot hold")
        self._guard(args, kwargs)
        outputs = _Replay(program.graph_module, self.recorder).run(*inputs)
        results = []
        named = dict(zip((spec.arg.name for spec in signature.input_specs), inputs, strict=True))
        for spec, value in zip(signature.output_specs, outputs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                results.append(value)
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                operator.attrgetter(str(spec.target))(self.root).copy_(value)
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                named[str(spec.target)].copy_(value)
            else:
                raise TraceError(f"torch.export gives the graph a {spec.kind.name}, which a graph cannot hold")
        assert program.call_spec.out_spec is not None
        return pytree.tree_unflatten(results, program.call_spec.out_spec)

    def _guard(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide on what `torch.export` found the sizes of the inputs to have in common, which makes it guards."""
        arguments = inspect.signature(type(self.root).forward).bind(self.root, *args, **kwargs).arguments
        self.recorder.at = "torch.export"
        relations = dict.fromkeys(self.program._guards_code)
        try:
            for relation in relations:
                if not eval(relation, {"L": arguments}):
                    raise TraceError(f"torch.export relies on {relation}, which does not hold on the example inputs")
            for tensor in pytree.tree_leaves((args, kwargs)) if self.several else ():
                if isinstance(tensor, torch.Tensor) and tensor.dim():
                    operator.gt(tensor.size(0), 1)
        except (LookupError, NameError, AttributeError, TypeError) as error:
            raise TraceError(f"torch.export relies on {relation}, which cannot be checked: {error}") from error
        finally:
            self.recorder.at = None


class _Replay(fx.Interpreter):
    """Computes a captured graph with the functions that the user might have written."""

    def __init__(self, gm: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node where its captured origin is."""
        stack = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
        module = str(stack[-1]) if stack and not str(stack[-1]).startswith("_empty") else ""
        self.recorder.paths.append(module)
        self.recorder.at = _line(n.meta.get("stack_trace") or "")
        try:
            result = super().run_node(n)
        finally:
            self.recorder.paths.pop()
        if n.op == "placeholder":
            self._fix(result, n.meta.get("val"))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call, but for assertions, which guards stand for, and copies that nothing needs."""
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(str(target), args)
        if not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs)
        name = target.overloadpacket.__name__
        if name.startswith("_assert"):
            return None
        if name == "clone" and not kwargs and self.recorder.node_of(args[0]).op not in ("placeholder", "get_attr"):
            return args[0]  # The graph changes nothing in place; what was a dropout is a clone.
        return super().call_function(target, args, kwargs)

    def _inline(self, name: str, args: tuple[Any, ...]) -> Any:
        """Compute the graph inside one that only sets a state of torch."""
        inner = [i for i, arg in enumerate(args) if isinstance(arg, fx.GraphModule)]
        if name not in _INLINED or not inner:
            raise TraceError(f"torch.export gives the graph the operator {name}, which a graph cannot hold")
        return _Replay(args[inner[0]], self.recorder).run(*args[inner[0] + 1 :])

    def _fix(self, value: Any, captured: Any) -> None:
        """Decide on the sizes and numbers of an input that `torch.export` took for fixed."""
        if isinstance(value, torch.Tensor) and isinstance(captured, torch.Tensor):
            with self.recorder.working():
                fixed = [dim for dim, size in enumerate(captured.shape) if isinstance(size, int)]
            if self.recorder.varies(value):
                for dim in fixed:
                    operator.index(value.size(dim))
        elif is_symbol(value) and not isinstance(captured, torch.SymInt | torch.SymFloat):
            self.recorder.decide(value)


def _line(stack_trace: str) -> str:
    """The innermost line of the user's code in a captured stack trace."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', stack_trace)
    user = [f"{Path(name).name}:{number}" for name, number in lines if not is_internal(name)]
    return user[-1] if user else ""

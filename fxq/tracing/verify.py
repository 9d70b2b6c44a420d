"""A trace is believed only after it has computed what the model computes."""

from __future__ import annotations

import ast
import copy
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import GuardError, TraceError
from fxq.randomness import seed
from fxq.tracing.builder import REMEDY
from fxq.tracing.origin import Origin
from fxq.tracing.sharing import Writes, empty
from fxq.tracing.values import map_tensors, tensors

Call = tuple[tuple[Any, ...], dict[str, Any]]
Watch = Callable[[Call], dict[str, torch.Tensor]]
"""Traces the model on other inputs and returns the value of each node by name."""

NOISE = 16
"""Allowed between the graph and the model: units in the last place of a tensor's largest element."""


@dataclass(frozen=True)
class Eager:
    """What the model computes on the examples when it is called twice, and on another batch size where it takes one.

    changed: the settings that the first call changes. writes: whether a call writes to parameters or buffers.
    """

    call: Call
    first: Any
    second: Any
    changed: tuple[str, ...]
    other: tuple[Call, Any] | None
    writes: bool

    @classmethod
    def of(cls, model: nn.Module, call: Call) -> Eager:
        """Call copies of the model."""
        called = copy.deepcopy(model)
        settings, writes = _settings(called), Writes(model, called)
        first = _own(_run(called, call))
        changed = tuple(name for name, value in _settings(called).items() if settings.get(name, _UNSET) != value)
        second, written = _own(_run(called, call)), writes.seen()
        empty(called)  # before there is another copy
        another = _another_batch(call)
        if another is None:
            return cls(call, first, second, changed, None, written)
        called = copy.deepcopy(model)
        writes = Writes(model, called)
        try:
            other = another, _own(_run(called, another))
        except Exception:
            other = None  # It takes the examples' only.
        written |= writes.seen()
        empty(called)
        return cls(call, first, second, changed, other, written)


def _own(result: Any) -> Any:
    """An output in memory of its own: it may be the model's."""
    return map_tensors(result, lambda tensor: tensor.detach().clone())


Copier = Callable[[Any], Any]


def run(model: nn.Module, call: Call, times: int = 1, copied: Copier = copy.deepcopy) -> Any:
    """Call a copy of a module on copies of the inputs, with the random numbers that every such run has."""
    model = copied(model)
    for _ in range(times):
        result = _run(model, call)
    return result


def _run(model: nn.Module, call: Call) -> Any:
    args, kwargs = _cloned(call)
    seed()
    with torch.no_grad():
        return model(*args, **kwargs)


def verify(gm: fx.GraphModule, eager: Eager, watch: Watch, copied: Copier) -> None:
    """Raise `TraceError` unless the graph gives the model's output on the examples, and on another batch size."""
    _compare(gm, eager.call, eager.first, watch, "the example inputs", copied)
    if eager.other is None:
        return
    try:
        _compare(gm, *eager.other, watch, "another batch size", copied)
    except GuardError:
        return  # The model decides on the batch size, and the graph says so.


def verify_second_call(gm: fx.GraphModule, eager: Eager) -> None:
    """Raise `TraceError` unless the graph gives the model's output when called again."""
    if not is_same(eager.first, eager.second) and not is_same(eager.second, run(gm, eager.call, times=2)):
        cause = f", since it changes `{eager.changed[0]}`" if eager.changed else ""
        what = f"the model computes something else when it is called again{cause}"
        remedy = "keep that in a buffer (register_buffer) and compute with it as with any tensor"
        raise TraceError(what, remedy)  # Of no module: as a leaf it would have counted the calibration as well.


_UNSET = object()


def _settings(model: nn.Module) -> dict[str, Any]:
    """The numbers, strings and flags on the modules of a model, by path."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if type(value) in (bool, int, float, str)
    }


def takes_one_row(gm: fx.GraphModule, model: nn.Module, call: Call) -> bool:
    """Whether the graph computes what the model does on the first row of the examples, or says that it does not."""
    if not all(tensor.dim() for tensor in tensors(call)):
        return True
    args, kwargs = map_tensors(call, lambda tensor: tensor.detach()[:1])
    try:
        expected = run(model, (args, kwargs))
    except Exception:
        return True  # The model itself does not take one.
    try:
        return is_same(run(gm, (args, kwargs)), expected)
    except GuardError:
        return True
    except Exception:
        return False


def _compare(gm: fx.GraphModule, call: Call, expected: Any, watch: Watch, where: str, copied: Copier) -> None:
    try:
        actual = run(gm, call, copied=lambda model: copied(model).forward)  # called as a module it prints what fails
    except GuardError:
        raise
    except Exception as error:
        what = f"the traced graph fails on {where}, which the model takes: {error}"
        raise _blame(what, gm, call, expected, watch) from error
    if not is_same(actual, expected):
        what = f"the traced graph does not compute what the model computes on {where}"
        raise _blame(what, gm, call, expected, watch)


def _cloned(call: Call) -> Call:
    args, kwargs = map_tensors(call, lambda tensor: tensor.detach().clone())
    return args, kwargs


def _another_batch(call: Call) -> Call | None:
    """The examples with one more row, if all their tensors have as many rows."""
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors(call)}
    if len(rows) != 1 or rows == {0}:
        return None
    args, kwargs = map_tensors(call, lambda tensor: torch.cat([tensor.detach().flip(0), tensor.detach()[:1]]))
    return args, kwargs


def is_close(actual: Any, expected: Any) -> bool:
    """Whether two outputs have the same shapes and, up to what another order of sums makes, the same values."""
    pairs = list(zip(tensors(actual), tensors(expected), strict=False))
    return all(
        a.shape == b.shape and (not b.is_floating_point() or torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True))
        for a, b in pairs
    )


def is_same(actual: Any, expected: Any) -> bool:
    """Whether two outputs are the same up to what memory that is aligned otherwise makes of a product."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return False
        if actual.layout is not expected.layout:
            return False
        if expected.layout is not torch.strided:
            actual, expected = actual.to_dense(), expected.to_dense()
        if not expected.is_floating_point():
            return torch.equal(actual, expected)
        # The same operations on memory aligned otherwise may round otherwise in a matrix product.
        finite = expected.detach().nan_to_num(0, 0, 0).abs()
        noise = NOISE * torch.finfo(expected.dtype).eps * float(finite.max() if finite.numel() else 0)
        return torch.allclose(actual, expected, rtol=0, atol=noise, equal_nan=True)
    if type(actual) is not type(expected):
        return False
    parts = _parts(expected)
    if parts is None:
        return bool(actual == expected)
    return len(parts) == len(others := _parts(actual) or []) and all(map(is_same, others, parts))


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return list(value) if isinstance(value, list | tuple) else None


class _Comparing(fx.Interpreter):
    """Runs a graph against the known values of its nodes, and keeps the first node that has another, or fails."""

    def __init__(self, gm: fx.GraphModule, known: dict[str, torch.Tensor]) -> None:
        super().__init__(gm)
        self.known = known
        self.first: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception:
            self.first = self.first or n
            raise
        if self.first is None and n.name in self.known and not is_same(result, self.known[n.name]):
            self.first = n
        return result


def _mistaken(gm: fx.GraphModule) -> str:
    """The arguments that the graph's code reads for what torch.fx means by their names: Python's `slice`, `device`."""
    read = Counter(name.id for name in ast.walk(ast.parse(gm.code)) if isinstance(name, ast.Name))
    renamed = [str(node.target) for node in gm.graph.find_nodes(op="placeholder") if node.name != node.target]
    return ", ".join(f"`{name}`" for name in renamed if read[name] > 1)  # once where the argument gets its other name


def _blame(what: str, gm: fx.GraphModule, call: Call, expected: Any, watch: Watch) -> TraceError:
    """Return an error that names the first operation to differ, and its module."""
    args, kwargs = _cloned(call)
    comparing = _Comparing(copy.deepcopy(gm), watch(call))
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    seed()
    with torch.no_grad(), suppress(Exception):
        comparing.run(*bound.arguments.values())
        if comparing.first is None and (names := _mistaken(gm)):
            cause = f"its operations do, but its code, where it calls {names}, reads the argument of that name"
            return TraceError(f"{what}: {cause}", "give the argument another name", final=True)
    if (node := comparing.first) is None:
        return TraceError(f"{what}; no single operation differs", REMEDY)
    origin: Origin = node.meta["origin"]
    first = f"%{node.name} = {node._pretty_print_target(node.target)} in module '{origin.module}' ({origin.line})"
    return TraceError(f"{what}; the first to differ is {first}", REMEDY, origin.module)

"""From a model and example inputs to a float graph that computes the same: run the model, write down what it does.

`trace` copies the model (`prepare`) and runs it under a recorder (`recorder`, `spelling`, `values`) on the example
inputs (`signature`), whose sizes and numbers are symbols (`symbols`), to build a graph (`builder`). Where the model's
own code cannot be recorded, what `torch.export` makes of it is (`exported`). Then the graph runs against the model
(`verify`), and guards that bind nobody go (`rows`). What a graph is made of besides torch is in `graph_functions`,
where its nodes come from in `origin`.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import keyword
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxq.errors import FxqError, InputError, TraceError
from fxq.randomness import Randomness, seed
from fxq.tracing import outside, signature, verify
from fxq.tracing.builder import REMEDY
from fxq.tracing.exported import Exported, export
from fxq.tracing.graph_functions import (
    GLOBAL_STATE,
    SignatureCodeGen,
    TracingWarning,
    UnpicklingTracer,
    guard,
    guards,
    length,
    mutate,
    name_apart,
    power,
    rounded,
    structure,
    whole,
)
from fxq.tracing.origin import Origin, line_of
from fxq.tracing.prepare import prepare
from fxq.tracing.recorder import Recorder
from fxq.tracing.rows import drop_idle_guards
from fxq.tracing.sharing import Writes, empty, own, shared, tensors_of

__all__ = [
    "AS_LEAF",
    "WHOLE",
    "Origin",
    "SignatureCodeGen",
    "TracingWarning",
    "UnpicklingTracer",
    "guard",
    "guards",
    "length",
    "mutate",
    "power",
    "rounded",
    "structure",
    "trace",
    "whole",
]

Leaves = tuple[type[nn.Module] | str, ...]
Frontend = Literal["auto", "trace", "export", "leaf"]
WHOLE = "_model"
"""The path of the user's model in the graph that frontend="leaf" gives."""
AS_LEAF = "the model as a leaf, as asked"
"""How that graph was captured, in `meta["frontend"]`."""
Recording = tuple[Recorder, dict[str, torch.Tensor]]
"""A finished trace, and the constants that its graph needs besides the model's own."""


@dataclass(frozen=True)
class _Task:
    """A model's copy, what it computes, what stays one call, and the program that stands for its code, if any.

    call: what it is called with. share: whether the graph may share the model's memory. several: the program is for
    more than one row.
    """

    prepared: nn.Module
    eager: verify.Eager
    call: verify.Call
    leaves: Leaves
    share: bool
    program: ExportedProgram | None = None
    several: bool = False
    untraceable: dict[str, str] = field(default_factory=dict)

    def copied(self, model: nn.Module) -> Any:
        """A copy to call: where the model writes to its own memory, with memory of its own."""
        return copy.deepcopy(model) if self.eager.writes else shared(model)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    leaves: Leaves = (),
    frontend: Frontend = "auto",
    share: bool = False,
) -> fx.GraphModule:
    """Return a float GraphModule with the model's signature that computes what the model computes in eval mode.

    It shares nothing with the model, which stays as it is; with `share`, it shares the memory of parameters and buffers
    where it is known that nothing in it writes to them: where `meta["stateless"]` is True.
    Each node has its `Origin` in `node.meta["origin"]`.
    Modules that are instances of a type in `leaves`, or whose path matches a name in it (`*` and `?` allowed), stay one
    call. So do the innermost modules whose code cannot be recorded; `node.meta["untraceable"]` says why. Where the
    model's own code cannot be, `torch.export` is tried; `frontend` forces one of the two, and `meta["frontend"]` says
    which it was. "leaf" makes a graph of one call: of the model, whose code stays as it is, at the path `WHOLE`.

    Raises `InputError` if the model itself cannot run on the examples, and `TraceError`, naming the user's line, if it
    cannot be captured or the graph computes anything else than the model, on the examples or with one more row.
    A call of the result raises `GuardError` where it differs from the examples in what the model's Python code decided.
    """
    if frontend not in get_args(Frontend):
        raise InputError(f"unknown frontend {frontend!r}; there are {', '.join(get_args(Frontend))}")
    prepared = prepare(model)
    call = (args, kwargs)
    signature.check(signature.bind(prepared, *call))
    with GLOBAL_STATE, Randomness(), _fused_attention(False):
        try:
            eager = verify.Eager.of(prepared, call)
        except Exception as error:
            raise InputError(f"{type(model).__name__} itself fails on the example inputs: {error}") from error
        _warn_of_fused_attention(prepared, call, eager.first)
        task = _Task(prepared, eager, call, leaves, share)
        if frontend == "leaf":
            why = {WHOLE: "its own code stays as it is, as asked"}
            return _verified(replace(task, prepared=_whole(prepared), untraceable=why), AS_LEAF)
        if frontend == "export":
            _refuse_swallowed(task)
            return _export(task, "torch.export, as asked")
        try:
            return _verified(task, "value-carrying symbolic trace")
        except TraceError as error:
            if frontend == "trace" or error.caught or error.final:
                raise
            try:
                return _export(task, f"torch.export, since {error.what}")
            except TraceError as second:
                both = error.what if error.what == second.what else f"{error.what} ({second.what})"
                raise TraceError(both, error.remedy) from error


def _whole(model: nn.Module) -> nn.Module:
    """A module of the signature of `model` that does nothing but call it."""

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(WHOLE)(*args, **kwargs)

    known = inspect.signature(model.forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = known.replace(parameters=[itself, *known.parameters.values()])  # type: ignore[attr-defined]
    holder: nn.Module = type(type(model).__name__, (nn.Module,), {"forward": forward})()
    holder.add_module(WHOLE, model)
    return holder.eval()


def _export(task: _Task, served: str) -> fx.GraphModule:
    inputs = signature.spread(signature.bind(task.prepared, *task.call))
    task = replace(task, leaves=(), untraceable={}, program=export(copy.deepcopy(task.prepared), inputs))
    gm = _verified(task, served)
    if verify.takes_one_row(gm, task.prepared, task.call):
        return gm
    return _verified(replace(task, several=True), served)


def _refuse_swallowed(task: _Task) -> None:
    """Raise `TraceError` where the model catches the exception by which it is told that it cannot be captured.

    `torch.export` would take for the model's answer what it does then.
    """
    try:
        recorder, _ = _record_once(task, watch=False)
        swallowed = recorder.swallowed
    except TraceError as error:
        if error.final:
            raise
        swallowed = error if error.caught else None
    if swallowed is not None:
        what = f"the model catches the exception that stops its capture: {swallowed.what}"
        raise TraceError(what, REMEDY) from swallowed


def _verified(task: _Task, served: str) -> fx.GraphModule:
    """Record a graph and hold it to what the model computes; modules that differ become leaves."""
    while True:
        try:
            recorder, constants = _record(task)
            if recorder.writes:
                task = replace(task, eager=replace(task.eager, writes=True))
            gm = _graph_module(task, recorder, constants)
            for node in gm.graph.nodes:
                if node.op == "call_module" and node.target in task.untraceable:
                    node.meta["untraceable"] = task.untraceable[node.target]
                    if node.target == WHOLE:
                        node.meta["origin"] = Origin("", "")
            gm.meta["frontend"] = served
            verify.verify(gm, task.eager, partial(_watch, task), task.copied)
            verify.verify_second_call(gm, task.eager)
            if task.program is None:
                recorded = partial(_recorded, task)
                drop_idle_guards(gm, task.prepared, task.call, recorded, task.copied)
            if not (task.share and gm.meta["stateless"]):
                own(gm, tensors_of(task.prepared))
            return gm
        except TraceError as error:
            if task.program is not None or not error.module:
                raise
            if error.module in task.untraceable:
                what = f"{task.untraceable[error.module]}; as a leaf, {error.what}"
                raise TraceError(what, error.remedy, error.module, error.final) from error
            task.untraceable[error.module] = error.what


def _record(task: _Task) -> Recording:
    """Run copies of the model under a recorder until nothing that it meets is new to `untraceable`."""
    while True:
        recording = _record_either(task)
        if not recording[0].untraceable:
            return recording
        task.untraceable.update(recording[0].untraceable)


def _record_either(task: _Task, watch: bool = False) -> Recording:
    """Record what the model does, or, where that cannot be followed, what it does when it is being compiled.

    Libraries leave out their shortcuts on tensor values (a mask of ones, ...) where they believe to be compiled.
    """
    recording: Recording | None = None
    refusal: TraceError | None = None
    try:
        recording = _record_once(task, watch)
        if not recording[0].untraceable:
            return recording
    except TraceError as error:
        refusal = error
    try:
        with _seen_as_compiling():
            compiled = _record_once(task, watch, as_eager=False)
    except TraceError as error:
        if refusal is not None and error.what != refusal.what:
            what = f"{refusal.what}. Where it is told that it is being compiled: {error.what}"
            both = TraceError(what, REMEDY, refusal.module, refusal.final or error.final)
            both.caught = refusal.caught or error.caught
            raise both from refusal
    else:
        if recording is None or not compiled[0].untraceable:
            return compiled
    if recording is None:
        assert refusal is not None
        raise refusal
    return recording


def _watch(task: _Task, call: verify.Call) -> dict[str, torch.Tensor]:
    """Return the value of each node on another call."""
    return _record_either(replace(task, call=call), watch=True)[0].watched or {}


def _recorded(task: _Task, call: verify.Call) -> fx.Graph:
    """Return the graph of what the model does on another call."""
    return _record_either(replace(task, call=call))[0].graph


def _record_once(task: _Task, watch: bool, as_eager: bool = True) -> Recording:
    """Run a copy of the model under a recorder; return it with the constants that its graph needs.

    as_eager: whether the model writes to its memory only where its eager runs have shown that.
    """
    root = task.copied(task.prepared) if as_eager else copy.deepcopy(task.prepared)
    writes = None if as_eager else Writes(task.prepared, root)
    exported = None
    if task.program is not None:
        exported = root.__dict__["forward"] = Exported(task.program, root, task.several)
    recorder = Recorder(root, task.leaves, task.untraceable, watch)
    if exported is not None:
        exported.recorder = recorder
    args, kwargs = signature.place(recorder, signature.bind(task.prepared, *task.call))
    seed()
    try:
        with _wrapped_functions(recorder):
            output = recorder.run(args, kwargs)
    except FxqError as error:
        raise recorder.refusal or error from None
    except Exception as error:
        if recorder.refusal is not None:
            raise recorder.refusal from error
        raise TraceError(f"{line_of(error)} fails while it is traced: {error}", REMEDY) from error
    if recorder.refusal is not None:
        raise recorder.refusal
    constants = recorder.finish(output)
    outside.check(recorder)
    if writes is not None:
        recorder.writes = writes.seen()
        if not watch:
            constants = {name: tensor.detach().clone() for name, tensor in constants.items()}
            empty(root)
    return recorder, constants


def _graph_module(task: _Task, recorder: Recorder, constants: dict[str, torch.Tensor]) -> fx.GraphModule:
    root = task.copied(task.prepared)
    for name, tensor in constants.items():
        root.register_buffer(name, tensor.detach().clone())
    for node in recorder.graph.nodes:
        if node.op in ("get_attr", "call_module") and any(map(keyword.iskeyword, str(node.target).split("."))):
            raise TraceError(
                f"{node.target!r} has a word of Python's in its path, as code has not", "name it otherwise"
            )
        if node.op == "call_module":
            # Its hooks ran while it was traced, so they are in the graph already.
            module = root.get_submodule(str(node.target))
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            if str(node.target) in recorder.impure:
                module._is_impure = True
    name_apart(recorder.graph)
    gm = fx.GraphModule(root, recorder.graph, type(task.prepared).__name__)
    writes = task.eager.writes or recorder.impure or task.untraceable or any(n.target is mutate for n in gm.graph.nodes)
    gm.meta["stateless"] = not writes and not task.leaves
    return gm


@contextmanager
def _fused_attention(wanted: bool) -> Iterator[None]:
    """With or without the fused attention of eval mode, which rounds differently and hides the projections."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _warn_of_fused_attention(model: nn.Module, call: verify.Call, expected: Any) -> None:
    """Say so where the fused attention computes something else: an encoder zeroes the rows that its mask pads."""
    if not any(isinstance(module, nn.TransformerEncoder) for module in model.modules()):
        return
    with _fused_attention(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = verify.run(model, call)
    if not verify.is_close(fused, expected):
        what = "the fused path of nn.TransformerEncoder in eval mode gives other values behind a padding mask"
        warnings.warn(
            f"{what} (0, or fewer rows); the traced graph computes what enable_nested_tensor=False does",
            TracingWarning,
            stacklevel=4,
        )


@contextmanager
def _seen_as_compiling() -> Iterator[None]:
    """`torch.compiler.is_compiling()` says True."""
    flag = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = flag


@contextmanager
def _wrapped_functions(recorder: Recorder) -> Iterator[None]:
    """Record the functions given to `torch.fx.wrap` as single calls; refuse to compile, and warn of prints.

    What reads from outside the model gives symbols (`outside`). All threads see these functions, so `GLOBAL_STATE` is
    held; the recorder lets other threads through, and everyone once it has finished, as one may have kept a stand-in.
    """
    stand_ins = list(outside.stand_ins(recorder))
    for (_, name), scope in fx._symbolic_trace._wrapped_fns_to_patch.items():
        if callable(function := scope.get(name)):
            stand_ins.append((scope, name, partial(recorder.wrapped, function)))
    originals = [(scope, name, scope[name]) for scope, name, _ in stand_ins]
    compile, print = torch.compile, builtins.print
    try:
        for scope, name, stand_in in stand_ins:
            scope[name] = stand_in
        torch.compile = partial(recorder.compiling, compile)
        builtins.print = partial(recorder.printing, print)
        yield
    finally:
        recorder.busy = True
        torch.compile, builtins.print = compile, print
        for scope, name, function in reversed(originals):
            scope[name] = function

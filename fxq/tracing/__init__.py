"""From a model and example inputs to a float graph that computes the same: run the model, write down what it does.

`trace` copies the model (`prepare`) and runs it under a recorder (`recorder`, `spelling`, `values`) on the example
inputs (`signature`), whose sizes and numbers are symbols (`symbols`), to build a graph (`builder`); then it runs the
graph against the model (`verify`). What a graph is made of besides torch is in `graph_functions`, where its nodes come
from in `origin`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import FxqError, InputError, TraceError
from fxq.tracing import signature, verify
from fxq.tracing.builder import REMEDY
from fxq.tracing.graph_functions import (
    GLOBAL_STATE,
    SignatureCodeGen,
    TracingWarning,
    UnpicklingTracer,
    guard,
    guards,
    length,
    mutate,
    rounded,
    structure,
    whole,
)
from fxq.tracing.origin import Origin, is_internal
from fxq.tracing.prepare import prepare
from fxq.tracing.recorder import Recorder

__all__ = [
    "Origin",
    "SignatureCodeGen",
    "TracingWarning",
    "UnpicklingTracer",
    "guard",
    "guards",
    "length",
    "mutate",
    "rounded",
    "structure",
    "trace",
    "whole",
]

Leaves = tuple[type[nn.Module] | str, ...]


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, leaves: tuple[type[nn.Module] | str, ...] = ()
) -> fx.GraphModule:
    """Return a float GraphModule with the model's signature that computes what the model computes in eval mode.

    It shares nothing with the model, which stays as it is. Each node has its `Origin` in `node.meta["origin"]`.
    Modules that are instances of a type in `leaves`, or whose path matches a name in it (`*` and `?` allowed), stay one
    call.

    Raises `InputError` if the model itself cannot run on the examples, and `TraceError`, naming the user's line, if it
    cannot be captured or the graph computes anything else than the model, on the examples or with one more row.
    A call of the result raises `GuardError` where it differs from the examples in what the model's Python code decided.
    """
    prepared = prepare(model)
    call = (args, kwargs)
    signature.bind(prepared, *call)
    with GLOBAL_STATE, torch.random.fork_rng(devices=[]), _plain_attention():
        try:
            expected = verify.run(prepared, call)
        except Exception as error:
            raise InputError(f"{type(model).__name__} itself fails on the example inputs: {error}") from error
        gm = _graph_module(prepared, *_record(prepared, call, leaves))
        verify.verify(
            gm, prepared, call, expected, lambda call: _record(prepared, call, leaves, watch=True)[0].watched or {}
        )
    return gm


def _record(
    prepared: nn.Module, call: verify.Call, leaves: Leaves, watch: bool = False
) -> tuple[Recorder, dict[str, torch.Tensor]]:
    """Run a copy of the model under a recorder; return it with the constants that its graph needs."""
    try:
        return _record_once(prepared, call, leaves, watch)
    except TraceError as error:
        # Libraries leave out their shortcuts on tensor values (a mask of ones, ...) where they believe to be compiled.
        try:
            with _seen_as_compiling():
                return _record_once(prepared, call, leaves, watch)
        except TraceError as second:
            if str(second) == str(error):
                raise error from None
            raise TraceError(f"{error}. Where it is told that it is being compiled: {second}") from error


def _record_once(
    prepared: nn.Module, call: verify.Call, leaves: Leaves, watch: bool
) -> tuple[Recorder, dict[str, torch.Tensor]]:
    root = copy.deepcopy(prepared)
    recorder = Recorder(root, leaves, watch)
    args, kwargs = signature.place(recorder, signature.bind(prepared, *call))
    torch.manual_seed(0)
    try:
        with _wrapped_functions(recorder):
            output = recorder.run(args, kwargs)
    except FxqError as error:
        raise recorder.refusal or error from None
    except Exception as error:
        if recorder.refusal is not None:
            raise recorder.refusal from error
        raise TraceError(f"{_line_of(error)} fails while it is traced: {error}; {REMEDY}") from error
    if recorder.refusal is not None:
        raise recorder.refusal
    return recorder, recorder.finish(output)


def _graph_module(prepared: nn.Module, recorder: Recorder, constants: dict[str, torch.Tensor]) -> fx.GraphModule:
    root = copy.deepcopy(prepared)
    for name, tensor in constants.items():
        root.register_buffer(name, tensor.detach().clone())
    for node in recorder.graph.nodes:
        if node.op == "call_module":
            # Its hooks ran while it was traced, so they are in the graph already.
            module = root.get_submodule(str(node.target))
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            if str(node.target) in recorder.impure:
                module._is_impure = True  # type: ignore[assignment]
    return fx.GraphModule(root, recorder.graph, type(prepared).__name__)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused attention of eval mode, which rounds differently and hides the projections."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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
    """Record the functions given to `torch.fx.wrap` as single calls."""
    originals = []
    for (_, name), scope in fx._symbolic_trace._wrapped_fns_to_patch.items():
        if callable(function := scope.get(name)):
            originals.append((scope, name, function))
    try:
        for scope, name, function in originals:
            scope[name] = partial(recorder.wrapped, function)
        yield
    finally:
        for scope, name, function in originals:
            scope[name] = function


def _line_of(error: BaseException) -> str:
    """The innermost line of the user's code that an exception passed."""
    frames = [frame for frame in extract_tb(error.__traceback__) if not is_internal(frame.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the model"
